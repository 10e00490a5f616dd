"""A small network whose parameters are DTensors, trained on every rank; and as one process."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ebu_optim import EBUOptimizer
from ebu_optim.kernels import reference

from .launch import join, leave

STEPS = 4


class Net(nn.Module):
    """Widths that no number of ranks divides: of 3 rows over 4 ranks one has none."""

    def __init__(self, width: int = 7, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6), nn.LayerNorm(6)
            )
            self.head = nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fully_shard(m: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard as shard

    shard(m.body, **options)
    return shard(m, **options)


def mixed(**dtypes: torch.dtype) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return {"mp_policy": MixedPrecisionPolicy(**dtypes)}


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def tensor_parallel(m: nn.Module, over: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()}
    return parallelize_module(m, over, plan)


WRAPS: dict[str, Any] = {
    "fsdp": lambda m: fully_shard(m),
    "fsdp, kept whole after forward": lambda m: fully_shard(m, reshard_after_forward=False),
    "fsdp, bf16": lambda m: fully_shard(
        m, **mixed(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ),
    "hybrid": lambda m: fully_shard(m, mesh=mesh(2, world()[1] // 2, names=("replicate", "shard"))),
    "tensor parallel": lambda m: tensor_parallel(m, mesh(world()[1])),
}


def replicas(wrap: str) -> int:
    """How many different batches the ranks see."""
    return 1 if wrap == "tensor parallel" or not dist.is_initialized() else world()[1]


def loss(m: nn.Module, i: int, forget: bool, wrap: str, part: int = 0, parts: int = 1) -> Tensor:
    size = replicas(wrap)
    rank = world()[0] if size > 1 else 0
    generator = torch.Generator().manual_seed(2 * i + forget)
    x = torch.randn(24, 5, generator=generator).to(next(m.parameters()).dtype)
    x = x[part::parts][rank::size]
    return (m(x) - (1 if forget else -1)).square().sum() * size / 24


def build(wrap: str = "", dtype=torch.float64, width: int = 7, groups: bool = False, **options):
    m = Net(width, dtype)
    if dist.is_initialized() and wrap:
        m = WRAPS[wrap](m)
    params: Any = list(m.parameters())
    if wrap == "tensor parallel":  # plain parameters beside DTensors
        base = torch.optim.Adam(params, lr=0.01, foreach=False)
        return m, EBUOptimizer(base, **{"gamma": 3.0, "max_grad_norm": 0.5, **options})
    if groups:
        params = [{"params": params[:3]}, {"params": params[3:], "ebu_delta": (0.3, 0.7)}]
    base = torch.optim.Adam(params, lr=0.01)
    return m, EBUOptimizer(base, **{"gamma": 3.0, "max_grad_norm": 0.5, **options})


def backward(opt, m: nn.Module, i: int, wrap: str, factor: Any = 1, order: str = "fr") -> None:
    for j, phase in enumerate(order):
        with opt.forget() if phase == "f" else opt.remember():
            part, parts = order[:j].count(phase), order.count(phase)
            (loss(m, i, phase == "f", wrap, part, parts) * factor).backward()


def full(t: Tensor) -> Tensor:
    """A copy of the whole tensor, gathered for the comparison alone."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()


def train(wrap: str, order: str = "fr", warmup: bool = False, **options: Any) -> list[Any]:
    """Weights, F, figures and the gathered gradients of every step."""
    m, opt = build(wrap, **options)
    if warmup:
        opt.warmup_fisher([lambda i=i: loss(m, i, False, wrap).backward() for i in (90, 91)])
    history = []
    for i in range(STEPS):
        backward(opt, m, i, wrap, order=order)
        grads = []
        for phase in (opt.forget, opt.remember):
            with phase():
                grads.append([full(p.grad) for p in m.parameters()])
        opt.step()
        history.append(
            {
                "weights": [full(p) for p in m.parameters()],
                "fisher": [full(opt.fisher_of(p)) for p in m.parameters()],
                "grads": grads,
                "stats": opt.stats,
            }
        )
        opt.zero_grad()
    return history


@contextmanager
def counted():
    """Every collective of the block, as (name, bytes that this rank puts in)."""
    calls: list[tuple[str, int]] = []
    names = ["all_reduce", "all_gather", "broadcast", "reduce", "reduce_scatter", "all_to_all"]
    names += ["all_gather_into_tensor", "reduce_scatter_tensor"]

    def recorded(name, real):
        def call(*args, **kwargs):
            t = args[1] if name == "all_gather" else args[0]
            calls.append((name, t.numel() * t.element_size()))
            return real(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{n: recorded(n, getattr(dist, n)) for n in names}):
        from torch.distributed.tensor.debug import CommDebugMode

        with CommDebugMode() as functional:
            yield calls
    calls += [(str(op), -1) for op, n in functional.get_comm_counts().items() for _ in range(n)]


def collectives(wrap: str, **options: Any) -> list[Any]:
    """Of the fourth step's selection, combination and base, after the rank checks are over."""
    m, opt = build(wrap, **{"dtype": torch.float32, **options})
    for i in range(4):
        backward(opt, m, i, wrap)
        with counted() as calls:
            opt.step()
    return [sum(p.numel() for p in m.parameters()), *calls]


def nonfinite(how: str) -> dict[str, Any]:
    """One element of one rank's part of the forget gradient is not a number."""
    m, opt = build("fsdp", nonfinite=how)
    backward(opt, m, 0, "fsdp")
    with opt.forget():
        if world()[0] == 1:
            m.body[0].weight.grad._local_tensor.view(-1)[0] = torch.nan
    error = ""
    try:
        opt.step()
    except RuntimeError as e:
        error = str(e)
    backward(opt, m, 1, "fsdp")
    opt.step()
    return {
        "error": error,
        "skipped": opt.skipped_steps,
        "weights": [full(p) for p in m.parameters()],
    }


def scaler(bad: str) -> dict[str, Any]:
    """fp16's way of stepping; the second step overflows in one phase, on one rank's part alone."""
    m, opt = build("fsdp", dtype=torch.float32)
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scales = []
    for i in range(3):
        for phase in ("forget", "remember"):
            with getattr(opt, phase)():
                grad_scaler.scale(loss(m, i, phase == "forget", "fsdp")).backward()
                if i == 1 and phase == bad and world()[0] == 1:
                    m.body[0].weight.grad._local_tensor.view(-1)[0] = torch.inf
        grad_scaler.step(opt)
        grad_scaler.update()
        opt.zero_grad()
        scales.append(grad_scaler.get_scale())
    return {
        "scales": scales,
        "skipped": opt.skipped_steps,
        "weights": [full(p) for p in m.parameters()],
    }


def unsynced() -> str:
    """Micro-batches that FSDP2 keeps to itself would mix the two losses."""
    m, opt = build("fsdp")
    m.set_requires_gradient_sync(False)
    try:
        backward(opt, m, 0, "fsdp")
    except RuntimeError as e:
        return str(e)
    return ""


def given(wrap: str) -> list[Tensor]:
    """theta0 and F as mappings of whole tensors."""
    m = Net()
    anchor = {n: p.detach() + 0.1 for n, p in m.named_parameters()}
    fisher = {n: p.detach().square() for n, p in m.named_parameters()}
    if dist.is_initialized():
        m = WRAPS[wrap](m)
    by_param = [{p: held[n] for n, p in m.named_parameters()} for held in (anchor, fisher)]
    opt = EBUOptimizer(
        torch.optim.SGD(m.parameters(), lr=0.1), anchor=by_param[0], fisher=by_param[1], gamma=3.0
    )
    backward(opt, m, 0, wrap)
    opt.step()
    return [full(p) for p in m.parameters()]


def two_meshes() -> str:
    from torch.distributed.tensor import Shard, distribute_tensor

    one, other = mesh(world()[1]), mesh(1, world()[1])
    p = [
        nn.Parameter(distribute_tensor(torch.ones(4, 4), over, placements))
        for over, placements in ((one, [Shard(0)]), (other, [Shard(0), Shard(1)]))
    ]
    try:
        EBUOptimizer(torch.optim.SGD(p, lr=1.0))
    except TypeError as e:
        return str(e)
    return ""


def save_and_go_on(folder: Path) -> dict[str, Any]:
    """Two steps, a checkpoint, two more."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    m, opt = build("fsdp")
    advance(m, opt, range(2))
    model_state, optim_state = get_state_dict(m, opt)
    dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=folder / "dcp")
    return advance(m, opt, range(2, 4))


def load_and_go_on(folder: Path) -> dict[str, Any]:
    """The checkpoint on other ranks: other weights, no phase run yet."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    m, opt = build("fsdp" if world()[1] > 1 else "")
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    model_state, optim_state = get_state_dict(m, opt)
    state = {"model": model_state, "optim": optim_state}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(m, opt, model_state_dict=state["model"], optim_state_dict=state["optim"])
    loaded = {"loaded anchors": [full(opt.anchor_of(p)) for p in m.parameters()]}
    return loaded | advance(m, opt, range(2, 4))


def advance(m: nn.Module, opt: EBUOptimizer, steps: range) -> dict[str, Any]:
    for i in steps:
        backward(opt, m, i, "fsdp")
        opt.step()
        opt.zero_grad()
    params = list(m.parameters())
    return {
        "weights": [full(p) for p in params],
        "moments": [full(opt.state[p][k]) for p in params for k in ("exp_avg", "exp_avg_sq")],
        "steps": [float(opt.state[p]["step"]) for p in params],
        "anchors": [full(opt.anchor_of(p)) for p in params],
        "fisher": [full(opt.fisher_of(p)) for p in params],
        "stats": opt.stats,
        "count": opt.state_dict()["param_groups"][0]["ebu_step"],
    }


def accelerated(folder: Path) -> dict[str, Any]:
    """accelerate's own FSDP2 code, which without a GPU has to be told that it is wanted."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, GradientAccumulationPlugin

    twice = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=twice)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="NO_WRAP",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator.state.fsdp_plugin = plugin
    told = property(lambda _: DistributedType.FSDP, lambda *_: None)
    AcceleratorState.distributed_type = told  # type: ignore[assignment]
    m, opt = build("")
    m, prepared = accelerator.prepare(m, opt)
    result = {"sharded": all(hasattr(p, "placements") for p in m.parameters())}

    def steps(which: range) -> None:
        for i in which:
            for part in range(2):
                with accelerator.accumulate(m):
                    for phase in ("forget", "remember"):
                        with getattr(opt, phase)():
                            # accumulate divides by the number of micro-batches
                            accelerator.backward(2 * loss(m, i, phase == "forget", "fsdp", part, 2))
                    prepared.step()
                    prepared.zero_grad()

    steps(range(2))
    accelerator.save_state(folder / "accelerate")
    accelerator.wait_for_everyone()
    steps(range(2, 4))
    result["straight"] = [full(p) for p in m.parameters()]
    accelerator.load_state(folder / "accelerate")
    steps(range(2, 4))
    result["loaded"] = [full(p) for p in m.parameters()]
    return result


def threshold(grads: list[Tensor], k: int) -> float:
    dtype = reference.working_dtype(grads)
    return float(reference.key_to_value(reference.select([(grads, k)], dtype)[0][0], dtype))


WIDTHS = {"tensor parallel": 8}  # its layers need even shards
EVERY = [w for w in WRAPS if w != "fsdp, bf16"]
VARIANTS: dict[str, dict[str, Any]] = {
    "freeze": {"unrelated": "freeze"},
    "tensor": {"granularity": "tensor"},
    "groups": {"groups": True},
    "raw": {"fisher_scale": "raw", "penalty": "full"},
    "replaced": {"update": "replaced", "max_grad_norm": None},
    "micro-batches": {"order": "frfr"},
    "warmup": {"warmup": True},
    "float32": {"dtype": torch.float32},
}
SCENARIOS: dict[str, Any] = {
    **{w: lambda w=w: train(w, width=WIDTHS.get(w, 7)) for w in EVERY},
    **{v: lambda v=v: train("fsdp", **VARIANTS[v]) for v in VARIANTS},
    "fsdp, bf16": lambda: train("fsdp, bf16", dtype=torch.float32),
    **{f"collectives {n}": lambda n=n: collectives("fsdp", width=n) for n in (7, 700)},
    "collectives hybrid": lambda: collectives("hybrid"),
    "collectives float64": lambda: collectives("fsdp", dtype=torch.float64),
    **{f"nan {how}": lambda how=how: nonfinite(how) for how in ("raise", "skip")},
    **{f"scaler {bad}": lambda bad=bad: scaler(bad) for bad in ("forget", "remember", "nobody")},
    "unsynced": unsynced,
    "given": lambda: given("fsdp"),
    "two meshes": two_meshes,
    "save": lambda: save_and_go_on(Path(sys.argv[1])),
    "load": lambda: load_and_go_on(Path(sys.argv[1])),
    "accelerate": lambda: accelerated(Path(sys.argv[1])),
}

if __name__ == "__main__":
    join()
    results = {}
    for name in sys.argv[2:]:
        print(f"{name} on rank {dist.get_rank()}", flush=True)
        results[name] = SCENARIOS[name]()
        dist.barrier()
    torch.save(results, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
