"""Runs a part of a model over a packed row: up to the tuned layer, or from it on.

No family of models is named here. The model's own forward does the work (rotary embeddings, soft caps, logit scales);
what is cut away is cut by making decoder layers pass their input through and by hooks, for the length of one call. The
base's weights are never touched: `torch.func.functional_call` reads the tuned tensors in their place.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from worker.model import BaseModel
from worker.training.attention import packed_attention
from worker.training.packing import Packing


class UnsupportedLayerError(RuntimeError):
    """The model's decoder layers cannot be run over a part of the model, or over several sequences in one row."""


class _Reached(Exception):  # noqa: N818 - a signal that unwinds the forward, not an error
    """The forward has come to the tuned layer; nothing above it is needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def hidden_below(base: BaseModel, packing: Packing) -> Tensor:
    """The input of the tuned layer: [tokens, hidden size], in the model's dtype, on its device."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(_hidden_argument(args, kwargs))

    with packed_attention(base.model), _pre_hook(base.layers[base.layer_index], stop):
        try:
            base.model(**_inputs(packing.to(base.device)))
        except _Reached as reached:
            return reached.hidden[0].clone()
    raise UnsupportedLayerError(f"the forward never ran {base.layers_name}.{base.layer_index}")


def run_tuned_layer(base: BaseModel, packing: Packing, hidden: Tensor) -> None:
    """Run the tuned layer and nothing else, for hooks on its modules; `hidden` as for `logits_above`."""

    def stop(*_: object) -> None:
        raise _Reached(hidden)

    with packed_attention(base.model), _lower_layers_bypassed(base), _tuned_layer_fed(base, hidden.unsqueeze(0)):
        handle = base.layers[base.layer_index].register_forward_hook(stop)
        try:
            base.model(**_inputs(packing))
        except _Reached:
            return
        finally:
            handle.remove()


def logits_above(base: BaseModel, tensors: Mapping[str, Tensor], packing: Packing, hidden: Tensor) -> Tensor:
    """Run from the tuned layer on, with `tensors` in place of the base's: logits [target tokens, vocabulary].

    `hidden` is the tuned layer's input, [tokens, hidden size]. Differentiable with respect to `tensors`, which must
    have the model's dtype.
    """

    def at_targets(states: Tensor) -> Tensor:
        return states.squeeze(0).index_select(0, packing.targets.to(states.device))

    with (
        packed_attention(base.model),
        _lower_layers_bypassed(base),
        _tuned_layer_fed(base, hidden.unsqueeze(0)),
        _last_feed_forward_at(base, packing),
        _lm_head_fed(base, at_targets),
    ):
        output = functional_call(base.model, dict(tensors), kwargs=_inputs(packing))
    logits: Tensor = output.logits
    return logits


@contextmanager
def last_position_only(base: BaseModel) -> Iterator[None]:
    """Compute logits at the last position only: [sequences, vocabulary]. For decoding with padding on the left."""
    with _lm_head_fed(base, lambda hidden: hidden[:, -1]):
        yield


def _inputs(packing: Packing) -> dict[str, Any]:
    return {
        "input_ids": packing.token_ids,
        "position_ids": packing.position_ids,
        "use_cache": False,
        "packing": packing,
    }


@contextmanager
def _lower_layers_bypassed(base: BaseModel) -> Iterator[None]:
    def pass_through(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states

    with ExitStack() as restore:
        for layer in base.layers[: base.layer_index]:
            restore.callback(_restore_forward, layer, layer.__dict__.get("forward"))
            layer.__dict__["forward"] = pass_through
        yield


def _restore_forward(layer: nn.Module, own_forward: Callable[..., Any] | None) -> None:
    """Put back what the instance had; None means that it uses its class's forward."""
    if own_forward is None:
        del layer.__dict__["forward"]
    else:
        layer.__dict__["forward"] = own_forward


@contextmanager
def _tuned_layer_fed(base: BaseModel, hidden: Tensor) -> Iterator[None]:
    def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arrived = _hidden_argument(args, kwargs)
        # A family whose layers return tuples would be fed a part of what it should be, without a word.
        if arrived.shape != hidden.shape:
            raise UnsupportedLayerError(
                f"{base.layers_name}.{base.layer_index} got hidden states of shape {tuple(arrived.shape)} "
                f"instead of {tuple(hidden.shape)}"
            )
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    with _pre_hook(base.layers[base.layer_index], feed):
        yield


@contextmanager
def _last_feed_forward_at(base: BaseModel, packing: Packing) -> Iterator[None]:
    """Let the last layer's feed-forward see only the tokens that predict targets: nobody reads what it says of others.

    The others' outputs are zeros. One that runs before its layer's attention sees all: attention reads what it says.
    """
    layer = base.layers[-1]
    ran: list[nn.Module] = []

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if not ran:
            return None
        hidden = _hidden_argument(args, kwargs)
        narrowed = hidden.index_select(-2, packing.targets.to(hidden.device))
        return ((narrowed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": narrowed})

    def widen(_: nn.Module, __: object, output: Any) -> Any:
        if not ran:
            return output
        first, *others = output if isinstance(output, tuple) else (output,)
        whole = first.new_zeros(*first.shape[:-2], packing.tokens, first.shape[-1])
        whole = whole.index_copy(-2, packing.targets.to(first.device), first)
        return (whole, *others) if isinstance(output, tuple) else whole

    with _pre_hook(feed_forward(layer), narrow), ExitStack() as hooks:
        hooks.callback(feed_forward(layer).register_forward_hook(widen).remove)
        for part in filter(_attends, layer.children()):
            hooks.callback(part.register_forward_hook(lambda part, *_: ran.append(part)).remove)
        yield


def feed_forward(layer: nn.Module) -> nn.Module:
    """The largest part of a decoder layer that does not attend."""
    parts = [part for part in layer.children() if not _attends(part)]
    return max(parts, key=lambda part: sum(weight.numel() for weight in part.parameters()))


def _attends(part: nn.Module) -> bool:
    # What transformers' attention functions read of the module that calls them; families name it differently.
    return any(hasattr(inner, "is_causal") for inner in part.modules())


@contextmanager
def _lm_head_fed(base: BaseModel, pick: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the output embedding see only what `pick` takes from the hidden states [sequences, tokens, hidden size]."""
    lm_head = base.model.get_output_embeddings()
    if lm_head is None:
        raise UnsupportedLayerError(f"{type(base.model).__name__} has no output embedding")

    def feed(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (pick(args[0]), *args[1:]), kwargs

    with _pre_hook(lm_head, feed):
        yield


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UnsupportedLayerError("a decoder layer was called without hidden states as its first argument")
    return hidden
