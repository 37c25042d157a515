"""The operators that a program may call: functions of numbers, and nothing that reads files or memory.

Those of `torch.ops.aten` are named here, without a trailing `_` for the form that changes its argument. Operators of
other libraries, random numbers, and operators that show memory which nobody has written are left out.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

_NAMES = frozenset(
    """
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    _adaptive_avg_pool2d _adaptive_avg_pool3d add addbmm addcdiv addcmul addmm addmv alias alpha_dropout amax amin all
    any aminmax arange argmax argmin argsort asin asinh atan atan2 atanh atleast_2d avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat
    cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone column_stack concat concatenate
    constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d convolution copy cos cosh
    count_nonzero cross cummax cumprod cumsum deg2rad detach diag diag_embed diagonal diff div divide dot dropout
    dropout2d dropout3d einsum elu embedding eq erf erfc exp exp2 expand expand_as expm1 eye feature_dropout fft_fft
    fft_fft2 fft_ifft fft_ifft2 fft_irfft fft_irfft2 fft_rfft fft_rfft2 fill fix flatten flip fliplr flipud
    floor floor_divide fmod frac full full_like gather ge gelu glu greater greater_equal grid_sampler grid_sampler_2d
    group_norm gt hardshrink hardsigmoid hardswish hardtanh hstack im2col index index_add index_copy index_fill
    index_put index_select instance_norm isfinite isinf isnan item kthvalue layer_norm le leaky_relu lerp less
    less_equal lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid
    _log_softmax log_softmax logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill
    masked_scatter masked_select matmul max max_pool1d max_pool2d max_pool2d_with_indices maximum mean median meshgrid
    min minimum mish mm moveaxis movedim mul multiply mv narrow native_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training native_dropout native_group_norm native_layer_norm ne neg negative new_full
    new_ones new_zeros nonzero nonzero_numpy norm normalize not_equal numpy_T one_hot ones ones_like outer pad permute
    pixel_shuffle pixel_unshuffle pow prelu _prelu_kernel prod quantile reciprocal reflection_pad1d reflection_pad2d
    relu relu6 remainder renorm repeat replication_pad1d replication_pad2d reshape reshape_as rms_norm roll rot90 round
    rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_attention_math scatter scatter_add scatter_reduce searchsorted select select_scatter selu
    sigmoid sign silu sin sinh slice slice_scatter _softmax softmax softplus softshrink sort special_erf special_expit
    split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims
    _shape_as_tensor t T take take_along_dim tan tanh tensor_split threshold tile to _to_copy topk transpose tril
    tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold _unsafe_index _unsafe_view
    unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_nearest2d _upsample_nearest_exact2d var var_mean vdot view view_as vstack where
    xlogy zero zeros zeros_like sym_size sym_numel _local_scalar_dense _weight_norm _weight_norm_interface
    """.split()  # noqa: SIM905  # easier to read
)
_CHECKS = re.compile(
    r"torch\.ops\.aten\.(_assert_\w+|sym_constrain_range\w*)\.\w+|torch\._check\w*|torch\.ops\.higher_order\.noop"
)
_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_LARGEST = 2**63  # of a whole number


def find_operator(target: str) -> Callable[..., Any] | None:
    """Return the function that a program names, such as `torch.ops.aten.relu.default`; None for a check to leave out.

    Raises:
        ValueError: if mlperturb does not know the operator.
    """
    if _CHECKS.fullmatch(target):
        return None
    if target in _SYMBOLIC:
        return _bounded(_SYMBOLIC[target])
    found = _ATEN.fullmatch(target)
    if found is None or found[1].removesuffix("_") not in _NAMES or found[2].endswith("out"):
        raise ValueError(f"unknown operator {target!r:.120}")
    packet = getattr(torch.ops.aten, found[1], None)
    if packet is None or found[2] not in packet.overloads():
        raise ValueError(f"unknown operator {target!r:.120} in torch {torch.__version__}")
    called: Callable[..., Any] = getattr(packet, found[2])
    if found[1] in ("view", "_unsafe_view") and found[2] == "default":  # the same for any layout of the memory
        called = torch.ops.aten.reshape.default
    return called


def changes(called: Callable[..., Any]) -> tuple[int, ...]:
    """Return the places of the arguments that an operator changes."""
    if not isinstance(called, torch._ops.OpOverload):
        return ()
    arguments = called._schema.arguments
    return tuple(place for place, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write)


def _bounded(called: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of numbers that refuses other arguments, and whole numbers of more than 64 bits."""

    def call(*numbers: Any) -> Any:
        if not all(isinstance(number, int | float) for number in numbers):
            raise ValueError("expected numbers")
        result = called(*numbers)
        if isinstance(result, int) and abs(result) >= _LARGEST:
            raise ValueError("expected a whole number of 64 bits")
        return result

    return call


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > 64:
        raise ValueError("expected an exponent of at most 64")
    result: float = base**exponent
    return result


_SYMBOLIC: dict[str, Callable[..., Any]] = {
    "math.trunc": math.trunc,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "torch.sym_not": operator.not_,
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_ite": lambda truth, yes, no: yes if truth else no,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_sqrt": math.sqrt,
    "_operator.pow": _power,
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in "add sub mul floordiv truediv mod neg pos and_ or_ eq ne lt le gt ge".split()  # noqa: SIM905
    },
}
