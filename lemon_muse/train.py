"""The training loop: it moves a batch, calls the method, steps, logs, saves; it knows no method.

Everything that depends on chance is a function of (seed, step): the order of samples, the views,
the generators of the process. A checkpoint is therefore weights, optimiser and step; resuming gives
bit-identical results on the CPU, on any number of ranks the same samples and views.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lemon_muse import checkpoint, collapse, distributed, flops, optim, rundir, steps
from lemon_muse.backbones.vit import use_plain_attention
from lemon_muse.data import compose
from lemon_muse.data.order import part
from lemon_muse.data.shards import Index
from lemon_muse.encoder import save_encoder
from lemon_muse.errors import RunError, Stopped, UserError
from lemon_muse.methods import METHODS
from lemon_muse.methods.contract import Method
from lemon_muse.monitor import Clock, Monitor
from lemon_muse.recipe import FREE, Train, shard_facts
from lemon_muse.stop import Stop

Probe = Callable[[Any], dict[str, float]]
FEW = 8  # features that always lie near one line, as those of a collapse do


def run(cfg: Train, *, probe: Probe | None = None, card: dict[str, Any] | None = None) -> Path:
    """Train, and write the encoder folder.

    Args:
        cfg: settings.
        probe: called with the encoder every `cfg.probe.every` steps; its numbers are logged.
        card: further entries of the model card.

    Returns:
        The encoder's folder, `out/encoder`.

    Raises:
        UserError: data or settings do not fit.
        RunError: non-finite loss, collapse (if so configured).
        Stopped: a signal; everything is saved.
    """
    with distributed.process_group(cfg.device) as device, Stop() as stop:
        index = cfg.open_data()
        cfg.check(index)
        loop = Loop(cfg, index, device, probe)
        if distributed.rank() == 0:
            rundir.open_run(cfg.out, cfg, free=FREE)
        distributed.barrier()
        loop.resume()
        try:
            loop.train(stop)
        finally:
            loop.monitor.close()
        return loop.export(card or {})


class Loop:
    """State of a run: method, optimiser, step."""

    def __init__(self, cfg: Train, index: Index, device: torch.device, probe: Probe | None) -> None:
        self.cfg, self.index, self.device, self.probe = cfg, index, device, probe
        self.step, self.setting = 0, cfg.setting(index)
        method = METHODS[cfg.method.name][1](cfg.method, self.setting)
        synced = distributed.sync_batch_norm(method, device).to(device)
        # Convolutions run faster on both CPUs and tensor cores; other tensors are not concerned.
        self.method: Method = synced.to(memory_format=torch.channels_last)  # type: ignore[assignment, call-overload]
        self.optimiser = optim.build(self.method.param_groups(), cfg.optim)
        self.batches = steps.open_batches(
            cfg,
            index,
            method.reads,
            slides=method.wants_slides,
            rank=distributed.rank(),
            world=distributed.world(),
        )
        chosen = self.batches.order.chosen
        self.part = "" if chosen is None else chosen.digest()
        self.dtype = steps.precision(cfg)
        if device.type == "cpu" and self.dtype == torch.bfloat16:
            use_plain_attention(self.method)
        self.flops, self.peak, self.ending, self.again = 0.0, 1.0, False, False
        self.unit = f"{method.reads}_per_s"
        # Here, before the run folder is made: a wrong init= must leave nothing behind.
        self.found = checkpoint.load_newest(cfg.out / "checkpoints")
        if self.found is None and (start := getattr(cfg, "init", None)) is not None:
            self.method.start_from(start)  # type: ignore[operator]

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        found, self.found = self.found, None
        if found is not None:
            self.step, state = found
            if state.get("part", self.part) != self.part:
                raise UserError(
                    f"{self.cfg.out} was trained on another part: the file subset.weights or "
                    f"subset.table, or the shards have changed; give those it had, or another out=."
                )
            self.method.load_state_dict(state["method"])
            self.optimiser.load_state_dict(state["optimiser"])
        found_by = distributed.objects_of_ranks(self.step)
        if len(set(found_by)) > 1:
            raise RunError(
                f"ranks found checkpoints of different steps {found_by}; is out= on a shared disk?"
            )
        self.monitor = Monitor(
            self.cfg.out, first=self.step, steps=self.cfg.steps, active=distributed.rank() == 0
        )
        if self.step:
            self.monitor.say(f"continuing {self.cfg.out} from step {self.step}")

    def save(self) -> None:
        """Write a checkpoint (rank 0); the others wait."""
        if distributed.rank() == 0:
            state = {
                "method": self.method.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "config": self.cfg.model_dump_json(),
                "shards": json.dumps(shard_facts(self.setting)),
                "part": self.part,
                "version": rundir.__version__,
            }
            checkpoint.save(self.cfg.out / "checkpoints", self.step, state, keep=self.cfg.keep)
        distributed.barrier()

    def train(self, stop: Stop) -> None:
        """Steps from `self.step` to the end."""
        cfg = self.cfg
        self.monitor.say(
            f"{compose.describe(self.index, self.batches.order.chosen)}; {cfg.steps} steps of "
            f"{cfg.batch} on {distributed.world()} × {self.device.type}; chance-level loss "
            f"{self.method.chance():.3f}"
        )
        if self.step < cfg.steps:
            self._count_flops(self.batches.batch_at(self.step))
        runner, clock = self._runner(), Clock()
        for batch in self.batches.iterate(self.step, cfg.steps):
            clock.got_data()
            result = self._one_step(runner, batch, stop)
            self.step += 1
            clock.worked(cfg.batch)
            self.monitor.step(self.step)
            self._report(result, clock)
            if self.step % cfg.save_every == 0 or self.step == cfg.steps or self.ending:
                self.save()
            if self.ending and self.step < cfg.steps:
                raise Stopped(
                    f"stopped by {stop.name or 'another rank'} at step {self.step}; everything is "
                    f"saved in {cfg.out}, run the same words to go on.",
                    again=self.again,
                )
            clock.start_waiting()

    def _runner(self) -> Callable[..., dict[str, torch.Tensor]]:
        runner: nn.Module = self.method
        if self.cfg.compile:
            # Only the networks: views have data-dependent branches that are not worth a graph.
            for module in self.method.networks():
                module.compile()
        if distributed.world() > 1:
            where = [self.device] if self.device.type == "cuda" else None
            # Buffers (BN statistics of SyncBN) are equal on all ranks by construction.
            runner = DistributedDataParallel(self.method, device_ids=where, broadcast_buffers=False)
        return runner

    def _one_step(
        self, runner: Callable[..., dict[str, torch.Tensor]], batch: dict[str, Any], stop: Stop
    ) -> dict[str, float]:
        """Forward, backward, guard, optimiser, EMA. Returns scalars (keeps features for later)."""
        cfg, step = self.cfg, self.step
        # Whatever draws from the global generators (drop-path) is a function of the step as well.
        torch.manual_seed(steps.mix(cfg.seed, step, distributed.rank()))
        rate, decay = cfg.optim.rate(step, cfg.steps, cfg.batch), cfg.optim.decay(step, cfg.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
            if group["weight_decay"]:
                group["weight_decay"] = decay
        self.method.train()
        loss = torch.zeros((), device=self.device)
        scalars: dict[str, torch.Tensor] = {}
        features = []
        for number, micro in enumerate(self._parts(batch)):
            last = number == cfg.accumulate - 1
            quiet = nullcontext() if last or distributed.world() == 1 else runner.no_sync()  # type: ignore[attr-defined]
            with quiet:
                with torch.autocast(
                    self.device.type, self.dtype, enabled=self.dtype != torch.float32
                ):
                    out = runner(micro, step)
                (out["loss"] / cfg.accumulate).backward()
            loss += out["loss"].detach().float() / cfg.accumulate
            features.append(out["features"])
            for key in out.keys() - {"loss", "features"}:
                part_of = out[key].detach().float() / cfg.accumulate
                scalars[key] = scalars[key] + part_of if key in scalars else part_of
        bad, self.ending, final = distributed.agree(
            [not bool(loss.isfinite()), stop.wanted, stop.final], self.device
        )
        self.again = not final
        if bad:
            self._not_finite(loss, batch)
        norm = optim.clip(self.optimiser, cfg.optim.clip)
        self.method.before_step(step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        logged = self.method.after_step(step)
        self.features = torch.cat(features)
        names = sorted(scalars)
        means = distributed.mean_over_ranks(torch.stack([loss, *(scalars[k] for k in names)]))
        self.loss, self.scalars = means[0], dict(zip(names, means[1:].unbind(), strict=True))
        return {"lr": rate, **logged, **norm}

    def _parts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The rank's batch on the device, with its rows of the views, in accumulation parts."""
        cfg, world = self.cfg, distributed.world()
        mine = {k: torch.from_numpy(v) for k, v in batch.items() if k != "samples"}
        if self.device.type == "cuda":
            mine["pixels"] = mine["pixels"].pin_memory().to(self.device, non_blocking=True)
        views = steps.views_of(cfg, self.step, self.method.draw)
        rows = part(cfg.batch, distributed.rank(), world)
        views = [{k: v[rows] for k, v in view.items()} for view in views]
        return steps.parts(mine, views, cfg.accumulate)

    def _count_flops(self, batch: dict[str, Any]) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.flops = flops.of_step(self.method, self._parts(batch)[0])
        self.peak = flops.peak(self.device, self.dtype)

    def _not_finite(self, loss: torch.Tensor, batch: dict[str, Any]) -> None:
        """Stop before the optimiser touches the weights, and say where it came from."""
        mine = None if bool(loss.isfinite()) else self.batches.reader.describe(batch["samples"][:3])
        named = {r: who for r, who in enumerate(distributed.objects_of_ranks(mine)) if who}
        raise RunError(
            f"the loss is not finite at step {self.step} on rank(s) {sorted(named)}; first samples "
            f"of that batch: {'; '.join(f'rank {r}: ' + ', '.join(w) for r, w in named.items())}. "
            f"The weights were not touched: the last checkpoint is good. Lower optim.lr, set "
            f"optim.clip=1, or use precision=fp32."
        )

    def _report(self, values: dict[str, float], clock: Clock) -> None:
        """Log every few steps: health, throughput, data wait, MFU; run the online probe."""
        cfg = self.cfg
        probed = self.probe is not None and (
            self.step % cfg.probe.every == 0 or self.step in (1, cfg.steps)
        )
        if self.step % cfg.watch.every and self.step not in (1, cfg.steps) and not probed:
            return
        loss, chance = float(self.loss), self.method.chance()
        # Of all ranks and parts: a few rows alone look like a collapse.
        self.features = distributed.gather(self.features)
        health = collapse.measure(self.features)
        scalars = {k: float(v) for k, v in self.scalars.items()}
        rates = clock.rates(self.unit)
        values = {"loss": loss, "chance": chance, **scalars, **values, **health, **rates}
        if self.flops:
            values["mfu"] = rates[self.unit] * self.flops / self.peak / distributed.world()
        if probed and distributed.rank() == 0:
            assert self.probe is not None
            encoder = self.method.encoder()
            was_training = encoder.training
            encoder.eval()
            values.update(self.probe(encoder))
            encoder.train(was_training)
        self.monitor.log(self.step, values)
        clock.reset()
        self._judge(health, scalars, loss, chance)

    def _judge(
        self, health: dict[str, float], scalars: dict[str, float], loss: float, chance: float
    ) -> None:
        if self.cfg.watch.collapse == "off":
            return
        if len(self.features) < FEW:
            health = {**health, "effective_rank": math.inf, "top_share": 0.0}
        sentence = collapse.diagnose(
            health,
            loss=loss,
            chance=chance,
            step=self.step,
            steps=self.cfg.steps,
            dim=self.features.shape[1],
        ) or self.method.judge({"step": self.step, **scalars})
        hit = distributed.agree([sentence is not None], self.device)[0]
        if hit and self.cfg.watch.collapse == "stop":
            self.save()
            raise RunError(f"step {self.step}: {sentence or 'another rank reports collapse'}")
        if sentence:
            self.monitor.say(f"WARNING step {self.step}: {sentence}")

    def export(self, card: dict[str, Any]) -> Path:
        """Write `out/encoder` (rank 0)."""
        folder = self.cfg.out / "encoder"
        if distributed.rank() == 0:
            encoder = self.method.encoder()
            encoder.name = self.cfg.name
            about = {
                "Recipe": self.cfg.model_dump(mode="json"),
                "Data": f"{compose.describe(self.index, self.batches.order.chosen)}, from shards "
                f"of {len(self.index.header['slides'])} slides; {self.cfg.steps} steps of "
                f"{self.cfg.batch} {self.method.reads}.",
                "Code": f"lemon_muse {rundir.__version__}, git {rundir.git_state()}",
                **card,
            }
            save_encoder(encoder, folder, card=about)
        distributed.barrier()
        return folder
