"""Async tensor parallel: the products beside a collective are made part by part, while copy engines move the parts.

In compiled blocks the pass of `enable_async_tp` puts an operator in the place of a collective and the products next to
it. `gather_and_multiply` multiplies this rank's part of the sequence while the others' arrive, and those then;
`multiply_and_exchange` multiplies what the others get first, and its own while that leaves. A GPU's copy engines read
the parts from the other ranks' memory, over NVLink at about twice NCCL's rate, and need no processor of those that the
products run on. NCCL's kernels do: docs/performance.md says why products do not hide them.

torch has such a pass of its own (torch._inductor.fx_passes.micro_pipeline_tp). It leaves out a reduction of a sum of
products, which is what backward has for wq, wk, wv and for w1, w3; it gathers a sequence in another order than
attention takes; and it adds up what the ranks give in a kernel of its own, which here is part of the next.
"""

import operator
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.distributed import _symmetric_memory
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName

from torchtitan.config.errors import ConfigError

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)

Node: TypeAlias = Any
"""A torch.fx.Node, with arguments of the kinds that its target has."""


def enable_async_tp(tp_mesh: DeviceMesh) -> None:
    """Overlap tensor parallel's collectives with the products beside them in what is compiled from now on."""
    inductor.post_grad_custom_pre_pass = OverlapCollectives(tp_mesh.get_group().group_name)


# The operators, as they are computed on CPUs, by collectives. A part is (B, S / n, D) on each of n ranks; parts follow
# each other along dim: 1 is the sequence's order, with 0 the ranks' parts lie one behind the other (IN_A_ROW).


@torch.library.custom_op("torchtitan::gather_and_multiply", mutates_args=())
def gather_and_multiply(part: Tensor, weights: Sequence[Tensor], dim: int, ranks: int, group_name: str) -> list[Tensor]:
    """The ranks' parts as a whole, and its products with weights (D, N), each (B * S, N)."""
    gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(part.contiguous(), ranks, group_name))
    whole = torch.cat(gathered.chunk(ranks), dim)
    return [whole, *(whole.flatten(0, 1) @ weight for weight in weights)]


@gather_and_multiply.register_fake
def _(part: Tensor, weights: Sequence[Tensor], dim: int, ranks: int, group_name: str) -> list[Tensor]:
    return list(empty_whole_and_products(part, weights, dim, ranks))


def empty_whole_and_products(part: Tensor, weights: Sequence[Tensor], dim: int, ranks: int) -> Iterator[Tensor]:
    whole = part.new_empty(*part.shape[:dim], ranks * part.size(dim), *part.shape[dim + 1 :])
    yield whole
    for weight in weights:
        yield part.new_empty(whole.size(0) * whole.size(1), weight.size(1))


@torch.library.custom_op("torchtitan::multiply_and_exchange", mutates_args=())
def multiply_and_exchange(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], batch: int, dim: int, ranks: int, group_name: str
) -> Tensor:
    """What each rank has for this one's part, of the sum of products of inputs (B * S, K) with weights (K, N).

    Returns:
        (n, B, S / n, N), with dim 0 (n, B / n, S, N): the part is their sum over n.
    """
    products = [x @ weight for x, weight in zip(inputs, weights, strict=True)]
    parts = torch.stack(products).sum(0).unflatten(0, (batch, -1)).chunk(ranks, dim)
    one_each = [1] * ranks
    return c10d.wait_tensor(c10d.all_to_all_single(torch.stack(parts), one_each, one_each, group_name))


@multiply_and_exchange.register_fake
def _(inputs: Sequence[Tensor], weights: Sequence[Tensor], batch: int, dim: int, ranks: int, group_name: str) -> Tensor:
    shape = [batch, inputs[0].size(0) // batch, weights[0].size(1)]
    shape[dim] //= ranks
    return inputs[0].new_empty(ranks, *shape)


# On GPUs


class Workspace:
    """Memory that the ranks of a group read from each other, in two halves that operators take in turn.

    An operator writes to its half, has a barrier, and reads the others'. The half is written again two operators later,
    and by then every rank has come to the barrier of the one in between, which it does with its reading done.
    """

    def __init__(self, group_name: str) -> None:
        self._group_name = GroupName(group_name)
        self._half_bytes = 0
        self._turn = 0
        self._held: Tensor | None = None
        self._memory: Any = None

    def take(self, shape: Sequence[int], dtype: torch.dtype, count: int) -> "Half":
        """The next half, for `count` tensors of this shape on each rank."""
        slot_bytes = -(-torch.Size(shape).numel() * dtype.itemsize // 512) * 512  # products want them aligned
        if count * slot_bytes > self._half_bytes:
            self._grow(count * slot_bytes)
        self._turn = 1 - self._turn
        return Half(self._memory, shape, dtype, begin=self._turn * self._half_bytes, slot_bytes=slot_bytes)

    def _grow(self, half_bytes: int) -> None:
        if self._memory is not None:
            self._memory.barrier()
            torch.cuda.synchronize()  # nobody reads the old one any more
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            self._held = _symmetric_memory.empty(2 * half_bytes, dtype=torch.uint8, device=device)
            self._memory = _symmetric_memory.rendezvous(self._held, self._group_name)
        except RuntimeError as error:
            raise ConfigError(
                "parallelism.enable_async_tensor_parallel needs GPUs that read each other's memory, over NVLink, and"
                f" those of a tensor-parallel group here do not ({error}); leave it off, or keep each group on one host"
            ) from error
        self._half_bytes = half_bytes


class Half:
    """Of a workspace, until the next operator but one."""

    def __init__(self, memory: Any, shape: Sequence[int], dtype: torch.dtype, *, begin: int, slot_bytes: int) -> None:
        self.rank: int = memory.rank
        self.barrier = memory.barrier
        self._memory, self._shape, self._dtype, self._begin, self._slot_bytes = memory, shape, dtype, begin, slot_bytes

    def of(self, rank: int, index: int = 0) -> Tensor:
        """A tensor in the memory of a rank."""
        offset = (self._begin + index * self._slot_bytes) // self._dtype.itemsize
        return self._memory.get_buffer(rank, self._shape, self._dtype, offset)


get_workspace = cache(Workspace)


@cache
def get_copy_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@gather_and_multiply.register_kernel("cuda")
def _(part: Tensor, weights: Sequence[Tensor], dim: int, ranks: int, group_name: str) -> list[Tensor]:
    whole, *products = empty_whole_and_products(part, weights, dim, ranks)
    parts = whole.chunk(ranks, dim)
    outputs = [product.unflatten(0, whole.shape[:2]).chunk(ranks, dim) for product in products]
    shared = get_workspace(group_name).take(part.shape, part.dtype, 1)
    others = [(shared.rank + step) % ranks for step in range(1, ranks)]
    compute, copies = torch.cuda.current_stream(), get_copy_stream()
    shared.of(shared.rank).copy_(part)
    shared.barrier()
    copies.wait_stream(compute)
    with torch.cuda.stream(copies):
        arrivals = [copy(parts[rank], shared.of(rank)) for rank in others]
    copy(parts[shared.rank], part)
    for weight, output in zip(weights, outputs, strict=True):
        multiply(part, weight, output[shared.rank])
    for rank, arrival in zip(others, arrivals, strict=True):
        compute.wait_event(arrival)
        for weight, output in zip(weights, outputs, strict=True):
            multiply(parts[rank], weight, output[rank])
    return [whole, *products]


@multiply_and_exchange.register_kernel("cuda")
def _(inputs: Sequence[Tensor], weights: Sequence[Tensor], batch: int, dim: int, ranks: int, group_name: str) -> Tensor:
    inputs_of = list(zip(*(x.unflatten(0, (batch, -1)).chunk(ranks, dim) for x in inputs), strict=True))
    shape = (*inputs_of[0][0].shape[:2], weights[0].size(1))
    results = inputs[0].new_empty(ranks, *shape)
    shared = get_workspace(group_name).take(shape, results.dtype, ranks - 1)
    compute, copies = torch.cuda.current_stream(), get_copy_stream()
    for step in range(1, ranks):
        receiver, sender = (shared.rank + step) % ranks, (shared.rank - step) % ranks
        add_products(inputs_of[receiver], weights, shared.of(shared.rank, step - 1))
        # A product leaves no room for the barrier's kernel beside it: it has to come before the next one
        shared.barrier()
        copies.wait_stream(compute)
        with torch.cuda.stream(copies):
            copy(results[sender], shared.of(sender, step - 1))
    add_products(inputs_of[shared.rank], weights, results[shared.rank])
    compute.wait_stream(copies)
    return results


def copy(to: Tensor, source: Tensor) -> torch.cuda.Event:
    """Copy a part (B, s, D) piece by piece, since copy engines move what lies in one; the event of its end."""
    for piece, source_piece in [(to, source)] if to.is_contiguous() else zip(to, source, strict=True):
        piece.copy_(source_piece)
    event = torch.cuda.Event()
    event.record()
    return event


def add_products(inputs: Sequence[Tensor], weights: Sequence[Tensor], output: Tensor) -> None:
    for index, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        multiply(x, weight, output, is_added=index > 0)


def multiply(x: Tensor, weight: Tensor, output: Tensor, *, is_added: bool = False) -> None:
    """output (B, s, N) = x (B, s, K) @ weight (K, N), where x and output may be parts of longer sequences."""
    if x.is_contiguous() and output.is_contiguous():
        x, output = x.flatten(0, 1), output.flatten(0, 1)
        if is_added:
            output.addmm_(x, weight)
        else:
            torch.mm(x, weight, out=output)
        return
    weight = weight.expand(x.size(0), -1, -1)
    if is_added:
        output.baddbmm_(x, weight)
    else:
        torch.bmm(x, weight, out=output)


# The pass


class OverlapCollectives(CustomGraphPass):
    """Puts the operators in the place of a group's collectives and the products beside them, in a graph of aten."""

    def __init__(self, group_name: str) -> None:
        self._group_name = group_name

    def uuid(self) -> bytes:
        """By what the compiler's cache tells graphs with this pass from others."""
        return get_hash_for_files((__file__,), self._group_name)

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite `graph`. A collective that is not between products as those of a block are stays as it is."""
        for node in list(graph.nodes):
            is_gather = node.target is c10d.all_gather_into_tensor.default
            if not is_gather and node.target is not c10d.reduce_scatter_tensor.default:
                continue
            if node.args[-1] != self._group_name or len(node.users) != 1:
                continue
            (wait,) = node.users
            if overlap_gather(graph, node, wait) if is_gather else overlap_reduction(graph, node, wait):
                graph.eliminate_dead_code()
                graph.erase_node(wait)  # which counts as used
        graph.eliminate_dead_code()


def overlap_gather(graph: fx.Graph, gather: Node, wait: Node) -> bool:
    """Whether `gather` was replaced, so that nothing uses `wait`."""
    part, ranks, group_name = gather.args
    whole, dim = find_whole(wait, ranks)
    width = part.meta["val"].size(-1)
    products = [product for product in find_products_of(whole, width) if may_come_before(product.args[1], gather)]
    if part.meta["val"].ndim != 3 or dim > 1 or not products:
        return False
    weights = [product.args[1] for product in products]
    for weight in weights:
        move_before(weight, gather)
    with graph.inserting_before(gather):
        op = torch.ops.torchtitan.gather_and_multiply.default
        results = graph.call_function(op, (part, weights, dim, ranks, group_name))
        for index, node in enumerate([whole, *products]):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (results, index)))
    return True


def find_whole(wait: Node, ranks: int) -> tuple[Node, int]:
    """The gathered tensor in the order in which it is used, and the dimension along which parts follow each other."""
    cats = {user for split in wait.users for piece in split.users for user in piece.users}
    if len(wait.users) == len(cats) == 1 and (cat := cats.pop()).target is aten.cat.default:
        (split,) = wait.users
        if are_pieces(cat.args[0], split, ranks) and get_dim(split, 2) == 0:
            return cat, get_dim(cat, 1)
    return wait, 0


def are_pieces(nodes: Sequence[Node], split: Node, count: int) -> bool:
    """Whether these are all pieces of a split in their order."""
    pieces = [(operator.getitem, (split, index)) for index in range(count)]
    return split.target is aten.split.Tensor and [(node.target, node.args) for node in nodes] == pieces


def get_dim(node: Node, position: int) -> int:
    """An argument that says which of three dimensions, by default the first."""
    return node.args[position] % 3 if len(node.args) > position else 0


def find_products_of(whole: Node, width: int) -> Iterator[Node]:
    """The products of its rows, which are this wide, with matrices; through views."""
    for user in whole.users:
        if user.target in VIEWS:
            yield from find_products_of(user, width)
        elif user.target is aten.mm.default and user.args[0] is whole and whole.meta["val"].size(-1) == width:
            yield user


def overlap_reduction(graph: fx.Graph, reduction: Node, wait: Node) -> bool:
    """Whether `reduction` was replaced, so that nothing uses `wait`."""
    source, kind, ranks, group_name = reduction.args
    total, dim = find_total(source, ranks)
    products = find_terms(total)
    shape = total.meta["val"].shape
    if kind != "sum" or len(shape) != 3 or dim > 1 or not isinstance(shape[0], int) or not products:
        return False
    if any(product.meta["val"].shape != (shape[0] * shape[1], shape[2]) for product in products):
        return False
    with graph.inserting_before(reduction):
        inputs, weights = ([product.args[i] for product in products] for i in (0, 1))
        op = torch.ops.torchtitan.multiply_and_exchange.default
        results = graph.call_function(op, (inputs, weights, shape[0], dim, ranks, group_name))
        wait.replace_all_uses_with(graph.call_function(aten.sum.dim_IntList, (results, [0])))
    return True


def find_total(source: Node, ranks: int) -> tuple[Node, int]:
    """What is reduced, before it is put into the order of the ranks, and the dimension along which it is scattered."""
    if source.target is aten.cat.default and get_dim(source, 1) == 0:
        splits = {split for piece in source.args[0] for split in piece.all_input_nodes}
        if len(splits) == 1 and are_pieces(source.args[0], split := splits.pop(), ranks):
            return split.args[0], get_dim(split, 2)
    return source, 0


def find_terms(total: Node) -> list[Node]:
    """The products that `total` is the sum of; none if it is not, or if one is used elsewhere too."""
    if len(total.users) != 1:
        return []
    if total.target is aten.mm.default:
        return [total]
    if total.target in VIEWS:
        return find_terms(total.args[0])
    if total.target is aten.add.Tensor and not total.kwargs:
        terms = [find_terms(term) for term in total.args if isinstance(term, fx.Node)]
        return [term for found in terms for term in found] if len(terms) == 2 and all(terms) else []
    return []


def may_come_before(node: Node, place: Node) -> bool:
    """Whether it does not depend on `place`."""
    return node < place or (node is not place and all(may_come_before(other, place) for other in node.all_input_nodes))


def move_before(node: Node, place: Node) -> None:
    """Move what `node` needs, and it, in front of `place` if they are behind."""
    if place < node:
        for other in node.all_input_nodes:
            move_before(other, place)
        place.prepend(node)
