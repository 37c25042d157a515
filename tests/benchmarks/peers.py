"""The minimum-norm attacks of other libraries beside ours, on the one problem that all can state: flip one label.

    pip install -e '.[bench]' && pip install adv-lib
    python tests/benchmarks/peers.py --voc ../shared/voc --images 16 --passes 30,100,300

|A| = 1 and B is empty: for the others, a network of two classes whose logits are b - z and z - b, where b is the
label's boundary. Passes are counted in the network itself. RMSD, 0-255 scale, is over the photos that succeed: in
floats, and rounded to 8 bits plainly, as their users save them (ours is a file already). `over bare` is time over that
of as many bare passes, run at once after the attack. A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from batches import Batch, add_options, load_batches, save_rows
from torch import Tensor, nn

from mlperturb.attacks.goals import ClassificationGoal
from mlperturb.attacks.lattice import to_lattice
from mlperturb.attacks.methods import find_method
from mlperturb.attacks.problem import Problem
from mlperturb.targets import Targets

LABEL = 14  # person


class TwoClasses(nn.Module):
    """A label's absence and presence as two classes, and a third, which ALMA's loss needs, that never wins.

    Counts its passes, an image at a time.
    """

    def __init__(self, batch: Batch, label: int) -> None:
        super().__init__()
        self.batch, self.label = batch, label
        self.forward_passes = self.backward_passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_passes += len(images)
        size = images.shape[-1]
        model = self.batch.model.classifier.bind([(size, size)] * len(images))
        logit = model(images)[:, self.label] - self.batch.targets.boundary[self.label]
        if logit.requires_grad:
            logit.register_hook(self._count)
        return torch.stack([-logit, logit, torch.full_like(logit, -50.0)], dim=1)

    def _count(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)


Attack = Callable[[TwoClasses, Tensor, Tensor, int], Tensor]


def foolbox_attack(name: str) -> Attack:
    def run(network: TwoClasses, images: Tensor, classes: Tensor, passes: int) -> Tensor:
        import foolbox

        wrapped = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        if name == "ddn":
            attack = foolbox.attacks.DDNAttack(steps=passes // 2)
        else:
            searches = 9 if passes >= 270 else 5
            attack = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=searches, steps=passes // 2 // searches)
        return attack(wrapped, images, foolbox.criteria.Misclassification(classes), epsilons=None)[1]

    return run


def adv_lib_attack(name: str) -> Attack:
    def run(network: TwoClasses, images: Tensor, classes: Tensor, passes: int) -> Tensor:
        from adv_lib import attacks

        if name == "ddn":
            return attacks.ddn(network, images, classes, steps=passes // 2)
        if name == "fmn":
            return attacks.fmn(network, images, classes, norm=2, steps=passes // 2)
        return attacks.alma(network, images, classes, num_steps=passes // 2, init_lr_distance=0.5)

    return run


def torchattacks_cw(network: TwoClasses, images: Tensor, classes: Tensor, passes: int) -> Tensor:
    import torchattacks

    found: Tensor = torchattacks.CW(network, steps=passes // 2)(images, classes)
    return found


def art_deepfool(network: TwoClasses, images: Tensor, _classes: Tensor, passes: int) -> Tensor:
    from art.attacks.evasion import DeepFool
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(network, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 3, clip_values=(0, 1))
    attack = DeepFool(wrapped, max_iter=max(passes // 3, 1), nb_grads=2, batch_size=len(images), verbose=False)
    return torch.from_numpy(attack.generate(images.cpu().numpy().astype(np.float32))).to(images.device)


PEERS: dict[str, tuple[str, Attack]] = {
    "foolbox DDN": ("foolbox", foolbox_attack("ddn")),
    "foolbox C&W": ("foolbox", foolbox_attack("cw")),
    "adv-lib DDN": ("adv_lib", adv_lib_attack("ddn")),
    "adv-lib FMN": ("adv_lib", adv_lib_attack("fmn")),
    "adv-lib ALMA": ("adv_lib", adv_lib_attack("alma")),
    "torchattacks C&W": ("torchattacks", torchattacks_cw),
    "ART DeepFool": ("art", art_deepfool),
}


def ours(batch: Batch, passes: int) -> tuple[Tensor, int, int]:
    """Attack with ML-DDN; return the images and the passes of all of them."""
    flip = torch.zeros_like(batch.targets.flip)
    flip[:, LABEL] = True
    targets = Targets(flip, torch.zeros_like(flip), batch.targets.truth, batch.targets.boundary)
    problem = Problem(batch.model, batch.images, ClassificationGoal(targets), limit=passes)
    outcome = find_method("ml-ddn").load()(problem, iterations=500)
    return outcome.images, int(problem.meter.forward.sum()), int(problem.meter.backward.sum())


def bare_seconds(batch: Batch, forward: int, backward: int) -> float:
    """Return what so many passes of the whole batch take."""
    count = len(batch.images)
    started = time.perf_counter()
    for _ in range(backward // count):
        images = batch.images.clone().requires_grad_()
        torch.autograd.grad(batch.model(images).sum(), images)
    with torch.no_grad():
        for _ in range((forward - backward) // count):
            batch.model(batch.images)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--passes", default="30,100,300")
    arguments = parser.parse_args()
    arguments.case = "person"
    warnings.simplefilter("ignore")  # the libraries', of their own dependencies
    batches = load_batches(arguments)
    present = {name: attack for name, (module, attack) in PEERS.items() if find_spec(module)}
    rows = []
    print(f"{sum(len(batch.images) for batch in batches)} photos of {arguments.size} pixels, `person` to be flipped")
    print("| attack | passes | success | RMSD | success, rounded | RMSD, rounded | over bare |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for passes in map(int, arguments.passes.split(",")):
        for name in (*present, "mlperturb ml-ddn"):
            held: dict[str, list[bool]] = {"float": [], "rounded": []}
            rmsd: dict[str, list[float]] = {"float": [], "rounded": []}
            spent = seconds = bare = 0.0
            for batch in batches:
                network, started = TwoClasses(batch, LABEL), time.perf_counter()
                if name in present:
                    classes = (batch.targets.truth[:, LABEL] > 0).long()
                    images = present[name](network, batch.images.clone(), classes, passes).detach().to(batch.images)
                    forward, backward = network.forward_passes, network.backward_passes
                else:
                    images, forward, backward = ours(batch, passes)
                seconds += time.perf_counter() - started
                bare += bare_seconds(batch, forward, backward)
                spent += forward + backward
                for which, result in (("float", images), ("rounded", to_lattice(images))):
                    with torch.no_grad():
                        decided = batch.model(result)[:, LABEL] >= batch.targets.boundary[LABEL]
                    flipped = decided != (batch.targets.truth[:, LABEL] > 0)
                    held[which] += flipped.tolist()
                    rmsd[which] += (255 * (result - batch.images)[flipped].flatten(1).square().mean(1).sqrt()).tolist()
            count = len(held["float"])
            row = {"attack": name, "passes": spent / count, "over_bare": seconds / bare}
            for which, values in held.items():
                row |= {f"{which}_success": sum(values) / count}
                row |= {f"{which}_rmsd": sum(rmsd[which]) / len(rmsd[which]) if rmsd[which] else float("nan")}
            rows.append(row)
            print(
                f"| {name} | {row['passes']:.0f} | {row['float_success']:.0%} | {row['float_rmsd']:.3f} "
                f"| {row['rounded_success']:.0%} | {row['rounded_rmsd']:.3f} | {row['over_bare']:.2f} |",
                flush=True,
            )
    save_rows(arguments, rows)


if __name__ == "__main__":
    main()
