"""The settings of a training."""

from __future__ import annotations

from dataclasses import dataclass

from mlperturb.errors import UsageError
from mlperturb.training.adversarial import Threat
from mlperturb.training.losses import SHIFTS


@dataclass(frozen=True)
class Recipe:
    """The settings of a training.

    Attributes:
        architecture: a torchvision classification model, or `timm/NAME`.
        epochs: passes over the training set.
        batch_size: photos in a step, over all processes; the paper has 100.
        learning_rate: AdamW's peak learning rate, after a warm-up and before a cosine decay to zero.
        fresh_rate: factor of that rate for tensors that are not in the last initial file, such as a new head, which
            must change more than a pretrained backbone.
        weight_decay: AdamW's weight decay.
        instance_weight: lambda of Eq. 12, the weight of its instance-wise term.
        calibration_weight: weight of a binary cross-entropy beside Eq. 12, which alone is blind to a constant added
            to a label's logits; 0 is the paper's pure ranking loss.
        head_only: train the last layer on cached features, the paper's partial retraining.
        fresh_head: draw the last layer anew, even where the initial weights have it.
        shift: what is added to the logits at the end, fitted on the validation photos: a bias for each `label`, `one`
            for all, or `none`.
        probe: first fit the last layer alone, its weight decay chosen on the validation photos; then train the rest.
        blend: at the end mix the weights with those that training began from, in the proportion that is best on the
            validation photos: robust fine-tuning (Wortsman et al., WiSE-FT).
        layer_decay: how many times the learning rate of the layers above each layer has, counted in blocks from the
            head down; 1 for the same rate everywhere.
        freeze: patterns such as `blocks.0.*` of the names of parameters that stay as they are.
        views: keep what the frozen first layers give for so many random crops of each photo, and train the layers above
            on these; 0 to crop anew each time and pass through all layers.
        norm_momentum: of the statistics of batch normalisation; 0 leaves them as they are; None: the architecture's.
        amp: compute with 16 bits on the CPU too (bfloat16); CUDA always does (float16).
        mixup: each photo is mixed with a second photo, in a share drawn from Beta(mixup, mixup); 0 for no mixing.
        adversarial: train on network input perturbed within `linf:RADIUS` or `l2:RMSD`, on the 0-255 scale;
            empty for none.
        adversarial_steps: steps of the gradient ascent that perturbs them.
        clean_share: share of each batch that is left as it is.
        teacher_weight: share of the teachers' probabilities in the targets of the cross-entropy, in [0, 1].
        size: side of the square network input, stretched; 0 for the preprocessing of the architecture's own weights.
        mean: subtracted from pixels in [0, 1], if `size` is given.
        std: the pixels less `mean` are divided by it, if `size` is given.
        least_crop: the smallest share of a photo's area that a random crop keeps.
        train_size: side of the random crops trained on; 0 for that of the network input. A crop magnifies, so a
            smaller side shows objects at the size that whole photos will show them, and is cheaper.
        average: decay per step of the exponential moving average of the weights; 0 for no average.
        seed: the seed of shuffling and augmentation.
        workers: processes that decode photos.

    Raises:
        UsageError: if `adversarial` is not a threat, or the photos do not pass through the whole network; if there are
            steps or a share of clean photos without it; if `shift` is unknown.
    """

    architecture: str = "mobilenet_v2"
    epochs: int = 10
    batch_size: int = 100
    learning_rate: float = 5e-4
    fresh_rate: float = 1.0
    weight_decay: float = 1e-2
    instance_weight: float = 0.5
    calibration_weight: float = 1.0
    head_only: bool = False
    fresh_head: bool = False
    shift: str = "label"
    probe: bool = False
    blend: bool = False
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    views: int = 0
    norm_momentum: float | None = None
    amp: bool = False
    mixup: float = 0.0
    adversarial: str = ""
    adversarial_steps: int = 1
    clean_share: float = 0.0
    teacher_weight: float = 0.5
    size: int = 224
    mean: float = 0.5
    std: float = 0.5
    least_crop: float = 0.5
    train_size: int = 0
    average: float = 0.99
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.shift not in SHIFTS:
            raise UsageError(f"unknown `shift` {self.shift!r}: expected {', '.join(SHIFTS)}")
        if self.adversarial:
            Threat.parse(self.adversarial)
            if self.head_only or self.views:
                raise UsageError("expected `adversarial` without `head_only` and `views`: it perturbs whole photos")
        elif (self.adversarial_steps, self.clean_share) != (1, 0.0):
            raise UsageError("expected `adversarial` with `adversarial_steps` and `clean_share`, got none")
