"""The pictures that mlperturb wrote itself are told from photos by the report beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlperturb.run.outputs import is_own
from mlperturb.run.report import SCHEMA, to_json
from mlperturb.system.files import parse_path


def write(path: Path, text: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json({"schema": SCHEMA, "images": []}) if text is None else text)


CHARTS = ("jpeg-curve.png", "jpeg-histogram.png")
FIGURES = ("figures/case-a.png", "figures/histogram-cat.png", "figures/jpeg-curve.png")


@pytest.mark.parametrize("root", ["", "memory://own/"])
def test_charts_and_figures_are_ours_only_beside_a_report_of_ours(tmp_path, root):
    folder = parse_path(f"{root}x") if root else tmp_path
    for name in (*CHARTS, *FIGURES):
        write(folder / name, "picture")

    def own(names: tuple[str, ...]) -> list[bool]:
        return [is_own(folder / name) for name in names]

    assert own(CHARTS + FIGURES) == [False] * 5
    write(folder / "report.json")
    assert own(CHARTS) == [False] * 2
    assert own(FIGURES) == [True] * 3
    write(folder / "report.json", '{"schema": "another/1"}')
    assert own(FIGURES) == [False] * 3
    write(folder / "jpeg-defence.json")
    assert own(CHARTS + FIGURES) == [True] * 5
    assert own(("figures/photo.png", "case-a.png", "other/case-a.png", "photo.png")) == [False] * 4
    assert own(("a.adv.png", "figures/a.map.png")) == [True] * 2


def test_a_figure_is_ours_from_its_own_folder_too(tmp_path, monkeypatch):
    write(tmp_path / "figures" / "case-a.png", "picture")
    write(tmp_path / "report.json")
    monkeypatch.chdir(tmp_path / "figures")
    assert is_own(Path("case-a.png"))


def test_a_report_that_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "jpeg-defence.json")
    assert not is_own(tmp_path / "jpeg-curve.png")


def test_a_chart_is_ours_wherever_it_lies_and_a_photo_of_its_name_is_not(tmp_path):
    from matplotlib.figure import Figure

    from mlperturb.show.figures import save_figure

    for name in ("transfer.png", "matrix.png", "curve-person.png", "case-a.png"):
        save_figure(Figure(figsize=(1, 1)), tmp_path / name)
        assert is_own(tmp_path / name)
    (tmp_path / "case-a.png").rename(tmp_path / "photo.png")
    assert not is_own(tmp_path / "photo.png")
    write(tmp_path / "transfer.png", "picture")
    assert not is_own(tmp_path / "transfer.png")
    write(tmp_path / "case-b.png", "picture")
    os.mkfifo(tmp_path / "case-c.png")
    assert not any(is_own(tmp_path / name) for name in ("case-b.png", "case-c.png", "case-d.png"))
