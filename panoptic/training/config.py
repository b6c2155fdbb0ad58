"""The options of a training step and of its optimiser, which a command line reads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from panoptic.layers.config import Precision
from panoptic.ranges import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
)


@dataclass(frozen=True)
class Optim:
    """The optimiser, its schedule and what is done to gradients and weights."""

    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """The update rule."""
    lr: NonNegativeFloat = 1e-3
    """Learning rate for the global batch of the experiment, whatever the number of workers."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """Rule by which lr follows a global batch that differs from lr_batch. With Adam, none or sqrt."""
    lr_batch: NonNegativeInt = 0
    """The global batch that lr belongs to; 0 = the experiment's, so that nothing is scaled."""
    momentum: Decay = 0.9
    """Momentum of SGD."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two averages of Adam and AdamW."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty of Adam and SGD, decoupled decay of AdamW."""
    decay: Literal["weights", "weights_and_biases", "all"] = "weights"
    """Decayed parameters: neither norms nor biases (nothing 1-D), all but norms, or everything."""
    backbone_lr: NonNegativeFloat = 1.0
    """Factor on the learning rate of the backbone."""
    stage_decay: PositiveUnitFloat = 1.0
    """Factor on the backbone's learning rate from each stage to the one before it: res5 has the backbone's, res4 that
    times the factor, the stem its fourth power; 1 = the same for all."""
    layer_decay: PositiveUnitFloat = 1.0
    """Factor on the rate from each block of a plain ViT to the one before it (EoMT 0.8): the final norm and the last
    block have the backbone's rate, patches, positions and tokens that of the first block; 1 = the same for all."""
    layer_decay_embeddings: bool = False
    """Patches, positions and tokens come one step of layer_decay below the first block (ViTDet, with a backbone_lr that
    is layer_decay too)."""
    undecayed_layers: NonNegativeInt = 0
    """Last blocks that layer_decay leaves at the backbone's whole rate, the others keeping theirs (EoMT on DINOv3: the
    blocks that hold queries)."""
    schedule: Literal["poly", "cosine", "multistep", "constant"] = "poly"
    """Shape of the learning rate over the run."""
    power: NonNegativeFloat = 0.9
    """Exponent of poly."""
    milestones: tuple[NonNegativeInt, ...] = ()
    """Steps at which multistep multiplies the rate by gamma."""
    gamma: NonNegativeFloat = 0.1
    """Factor of multistep at each milestone."""
    final: UnitFloat = 0.0
    """Smallest factor on the rate: poly stops falling there, cosine ends there."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up; 0 = none."""
    warmup_factor: UnitFloat = 1e-3
    """Factor on the rate at the first step of warm-up."""
    backbone_warmup_steps: NonNegativeInt = 0
    """Steps of a second warm-up, of the backbone alone, whose rate is 0 until warmup_steps are over; 0 = it warms up
    with the rest."""
    schedule_start: Literal["first_step", "after_warmup"] = "first_step"
    """Step from which poly and cosine count: the first, which warm-up multiplies, or the one at which each parameter's
    own warm-up has ended (EoMT)."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the whole gradient; 0 = not clipped."""
    clip_value: NonNegativeFloat = 0.0
    """Largest absolute value of each entry of the gradient, before its norm is clipped; 0 = not clipped."""
    ema: Decay = 0.0
    """Decay of the averaged weights that are evaluated and kept beside the raw ones (less at first); 0 = none."""

    def __post_init__(self) -> None:
        if self.stage_decay != 1 and self.layer_decay != 1:
            raise ValueError(
                f"optim.stage_decay {self.stage_decay} and optim.layer_decay {self.layer_decay}: both give the "
                "backbone's rates; set one of them to 1"
            )


@dataclass(frozen=True)
class Engine:
    """Precision and memory format of a step, and its patience with numbers that are not finite."""

    precision: Precision = "float32"
    """Precision of the network, by autocast; losses and post-processing always run in float32. float16 (for GPUs
    before NVIDIA's Ampere) scales the loss, by a factor that follows the gradients; see `loss_scale`. A device without
    instructions for it (a CPU without AVX-512 BF16 or AMX, say) computes in float32, which is faster there."""
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    """The operations whose float32 inputs are rounded to TF32 (10 bits of mantissa) on NVIDIA GPUs since Ampere: none,
    convolutions (as torch does by itself), or matrix products too."""
    channels_last: bool = False
    """Memory format of images and weights, with the channels of a pixel side by side: faster on a GPU, and on CPU cores
    for convolutions (all presets for these set it). Transformers take the same time either way."""
    activation_checkpointing: bool = False
    """Blocks of backbone and transformers compute their activations again in the backward pass: less memory, a third to
    a half more time, the same numbers. --train.fit-memory switches it on before it takes fewer images at once."""
    max_skipped: PositiveInt = 5
    """Steps in a row with a loss or gradient that is not finite before training stops."""
