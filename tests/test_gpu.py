"""What only a CUDA device can show; skipped without one."""

from __future__ import annotations

import pytest
import torch
from support.models import ATTACKS, make_net, ragged_targets

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.problem import Problem
from mlperturb.model.checkpoints import bundled_checkpoint, load_checkpoint
from mlperturb.system.devices import free_memory, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_cuda_meets_what_it_meets_on_the_cpu(name):
    net = make_net()
    images, targets = ragged_targets(net)
    here = ATTACKS[name](Problem(net, images, ClassificationGoal(targets)))
    moved = type(targets)(*(t.cuda() for t in (targets.flip, targets.keep, targets.truth, targets.boundary)))
    there = ATTACKS[name](Problem(net.cuda(), images.cuda(), ClassificationGoal(moved)))
    assert there.images.is_cuda
    assert there.met.cpu().tolist() == here.met.tolist()


def test_the_bundled_classifier_sees_on_cuda_what_it_sees_on_the_cpu():
    prepare("cuda", 0)
    photo = torch.rand(3, 120, 160, generator=torch.Generator().manual_seed(0))
    here = load_checkpoint(bundled_checkpoint())[0]
    there = load_checkpoint(bundled_checkpoint(), device="cuda")[0]
    with torch.inference_mode():
        assert torch.allclose(there([photo.cuda()]).cpu(), here([photo]), atol=5e-2)


def test_a_run_on_cuda_succeeds_on_the_portrait(tmp_path, monkeypatch, capsys):
    import sys

    from mlperturb.cli.main import main

    monkeypatch.setattr(sys, "argv", ["mlperturb", "demo", "--out", str(tmp_path / "out"), "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert "success" in capsys.readouterr().out


def test_the_free_memory_of_the_gpu_is_told():
    device = torch.device("cuda")
    taken = torch.empty(1 << 26, dtype=torch.uint8, device=device)
    free = free_memory(device)
    assert free is not None
    assert 0 < free <= torch.cuda.get_device_properties(device).total_memory - len(taken)
