"""Reductions. Over unlabelled dimensions they drop the dimension; over channels they mix them, which freezes them."""

from __future__ import annotations

from ..flow import Flow
from .registry import Call, rule


def _dims(call: Call, ndim: int) -> list[int]:
    dim = call.arg("dim")
    if dim is None or dim == []:
        return list(range(ndim))
    return [d % ndim for d in ([dim] if isinstance(dim, int) else dim)] if ndim else []


_ADDITIVE = {
    "aten.sum",
    "aten.mean",
    "aten.norm",
    "aten.linalg_vector_norm",
    "aten.nansum",
    "aten.count_nonzero",
}


@rule("""
    sum mean amax amin max min var std prod norm linalg_vector_norm argmax argmin all any logsumexp
    var_mean std_mean median nansum nanmean count_nonzero aminmax
""")
def reduction(flow: Flow, call: Call) -> None:
    """Labels on reduced dimensions are frozen: a maximum or mean over channels changes when one is taken out."""
    tensors = [a for a in call.args if hasattr(a, "dim")]
    if len(tensors) > 1:  # max(a, b): elementwise
        out = call.outputs()[0]
        flow.set(out, flow.join(tensors, out.shape))
        return
    x = tensors[0]
    labels = flow.get(x)
    dims = set(_dims(call, x.dim()))
    for d in dims:
        own = labels[d]
        if call.name in _ADDITIVE and own is not None:
            flow.mixed.append(
                own
            )  # a removed channel is zero and adds nothing; the trial checks that it is zero
        else:
            flow.space.freeze(own, f"{call.name} reduces over these channels")
    kept = [v for d, v in enumerate(labels) if d not in dims]
    full = [None if d in dims else v for d, v in enumerate(labels)]
    for out in call.outputs():
        flow.set(out, full if out.dim() == x.dim() else kept)


@rule("""
    _softmax _log_softmax softmax log_softmax cumsum cumprod cummax sort topk kthvalue _safe_softmax
""")
def along(flow: Flow, call: Call) -> None:
    """Ops that run along one dimension and mix its positions: that dimension is frozen, the others pass."""
    x = call.args[0]
    labels = flow.get(x)
    dim = call.arg("dim", -1)
    if x.dim():
        flow.space.freeze(labels[dim], f"{call.name} runs along these channels")
        labels[dim] = None
    for out in call.outputs():
        flow.set(out, labels if out.dim() == x.dim() else [None] * out.dim())
