"""`nanovl train`: text -> tokenizer -> model -> checkpoints, samples, bits per byte, report. One job, any mesh."""

from __future__ import annotations

import base64
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanovl import __version__, dist
from nanovl.build import (
    architecture,
    build_model,
    build_optimizers,
    build_tokenizer,
    check_parallelism,
    resolve_sizes,
)
from nanovl.checkpoint.manager import Checkpointer, committed, resumable_meta
from nanovl.config.schema import Job
from nanovl.data.loader import Loader
from nanovl.device import (
    decide_modes,
    hardware,
    loss_chunk_tokens,
    peak_flops,
    peak_memory_gib,
    pick_device,
    set_determinism,
)
from nanovl.errors import NanovlError
from nanovl.eval.bpb import compressor_bpb
from nanovl.flops import attended_keys, reachable_keys, training_flops_per_token
from nanovl.hang import HangWatch, record_collectives
from nanovl.header import say_header
from nanovl.heldout import Heldout
from nanovl.initial import check_initial, counters_to_resume, told
from nanovl.log import Log, out
from nanovl.mesh import build_mesh
from nanovl.metrics import Meter, Metrics, duration, step_line, truncate_after
from nanovl.optim.expert_balance import ExpertBalance
from nanovl.optim.index_loss import IndexLosses
from nanovl.optim.qk_clip import QkClip
from nanovl.optim.scaling import SizeRules
from nanovl.profiling import Profiler
from nanovl.registry import spec_to_dict
from nanovl.report import write_report
from nanovl.run import Run, write_json
from nanovl.samples import continue_prompts
from nanovl.skipping import SkippedSteps
from nanovl.spec import Batch
from nanovl.startup import check_ranks, facts_of
from nanovl.step import StepResult, train_step
from nanovl.stopping import StopRequest

EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal asked to stop; the state is saved, run again with --resume


def train(job: Job, *, resume: bool = False, config_files: Sequence[str | Path] = ()) -> Run:
    """Train `job` to its end and return its run folder. Every rank of a torchrun launch calls it.

    Raises NanovlError for what a user can mend, and SystemExit(75) where a signal stopped the run after it was saved.
    """
    world = dist.world_from_env()
    run = Run(Path(job.job.run_dir))
    if world.rank == 0:
        run.require_fresh(resume)
        if found := committed(run.checkpoints)[-1:] if resume else []:
            resumable_meta(found[0])
        else:
            check_initial(job)
    device = pick_device(world.local_rank)
    check_parallelism(job, world.size, device, run.tokenizer if resume else None)
    if world.rank == 0:
        run.make()
    before = len(run.sessions())
    if world.size > 1:
        record_collectives(run.folder / "traces", job.comm.trace_buf_size)
    dist.start(device, job.comm.init_timeout_seconds)
    dist.barrier()  # no rank writes into the folder before rank 0 has found it fresh
    watch = HangWatch(run.folder / "traces", world.rank, world.size)
    trainer: Trainer | None = None
    reason = "crashed"
    try:
        trainer = Trainer(job, run, device, resume, config_files, watch)
        reason = trainer.train()
    except NanovlError as error:
        reason = f"failed: {error}"
        raise
    except RuntimeError as error:
        explained = watch.explain(error)
        if explained is None:
            raise
        reason = f"failed: {explained}"
        raise explained from error
    except KeyboardInterrupt:
        reason = "interrupted twice; not saved"
        raise
    finally:
        if trainer is not None:
            trainer.close(reason)
        elif world.rank == 0 and len(run.sessions()) > before:  # else the last one is not of this process
            run.end(reason)
        watch.close()
        dist.stop()
    if world.rank == 0:
        out(f"report            {write_report(run)}")
    if reason.startswith("stopped"):
        raise SystemExit(EXIT_STOPPED)
    return run


class Trainer:
    """One run in this process: built once, then `train()`."""

    def __init__(
        self,
        job: Job,
        run: Run,
        device: torch.device,
        resume: bool,
        config_files: Sequence[str | Path],
        watch: HangWatch,
    ) -> None:
        self.run, self.device, self.watch = run, device, watch
        self.world = dist.world_from_env()
        self.main = self.world.rank == 0
        self.log = log = Log(self.world.rank, run.folder / "logs")
        self.stop = StopRequest()
        if self.world.size > 1 and job.comm.check_at_start:
            skew = job.comm.max_clock_skew_seconds
            facts = facts_of(job, __version__, self.world.local_rank)
            agreed = check_ranks(facts, device, max_clock_skew_seconds=skew)
            log.say(f"  ranks     {agreed}")
        set_determinism(job.debug.deterministic)
        torch.manual_seed(job.debug.seed)
        self.mesh = build_mesh(job.parallelism, self.world.size, device)
        resumed_from = self._checkpoint_to_resume(resume)
        if self.main:
            if resumed_from is None:  # else only once the checkpoint has been found to fit
                run.write_job(job, config_files)
            run.begin(hardware(device), self.world.size, str(self.mesh))
        with dist.patience(job.comm.outside_timeout_seconds, job.comm.init_timeout_seconds):
            self.tokenizer = build_tokenizer(job, run, self.world.rank, log)
        self.spec = architecture(job, self.tokenizer)
        if resumed_from is not None:
            counters = counters_to_resume(resumed_from, self.spec)
        self.job, rules = resolve_sizes(job, self.spec, self.world.size)
        self._decide_numbers()
        if self.main:
            run.note(
                param_dtype=str(self.modes.param_dtype).removeprefix("torch."), compiled=self.modes.compile
            )
        say_header(log, self.job, self.spec, f"{self.mesh} on {hardware(device)}", run.folder)
        self._build(rules, fresh=resumed_from is None)
        self.step, self.tokens, self.seconds, self.flops = 0, 0, 0.0, 0.0
        self.skipped = SkippedSteps(self.job.training.max_skipped_steps, run, log, main=self.main)
        self.parents = [str(p) for p in (self.job.checkpoint.initial_load_path, resumed_from) if p]
        if resumed_from is not None:
            self._resume(resumed_from, counters)
        if self.main:
            run.write_job(self.job, config_files)
            truncate_after(run.metrics, self.step)
            truncate_after(run.folder / "samples.jsonl", self.step)
        self.metrics = Metrics(run.folder if self.main else None, self.job.metrics.tensorboard)
        self.profiler = Profiler(self.job.profiling, run.folder / "traces", self.world.rank)
        self.warned_of_cropping = False
        self.heldout = Heldout(self.job, self.tokenizer, self.mesh)

    def _decide_numbers(self) -> None:
        """Dtype, compilation, and the size of the loss's pieces."""
        training, config = self.job.training, self.spec.config
        self.modes = decide_modes(
            self.device,
            config.hidden_size,
            training.steps,
            training.mixed_precision_param,
            self.job.compile.enable,
        )
        self.chunk_tokens = training.loss_chunk_tokens or loss_chunk_tokens(self.device, config.vocab_size)

    def _build(self, rules: SizeRules, *, fresh: bool) -> None:
        """All that is as large as the model, and what reads data and writes checkpoints."""
        job, device, mesh, log = self.job, self.device, self.mesh, self.log
        self.model = build_model(job, self.spec, mesh, self.modes, device, log, fresh=fresh)
        with torch.device("meta"):
            self.arithmetic = self.spec.family.model(self.spec.config)  # all layers, to count FLOPs
        self.optimizers = build_optimizers(job, self.spec, self.model, rules, self.modes, log)
        self.balance = ExpertBalance(self.model.whole, mesh)
        self.index_losses = IndexLosses(self.model.whole, mesh)
        tau = job.optimizer.muon.qk_clip
        groups = [group for group in [mesh.group("loss")] if group is not None]
        self.qk_clip = QkClip(self.model.whole, tau, groups) if tau else None
        self.loader = Loader(job, self.tokenizer, rank=mesh.data_rank, degree=mesh.data_degree)
        mode = job.checkpoint.async_mode
        self.checkpointer = Checkpointer(
            self.run.checkpoints,
            self.model.whole,
            self.optimizers.optimizers,
            job.checkpoint.keep_latest_k,
            mode == "async" or (mode == "auto" and device.type == "cuda"),
            log,
        )

    def train(self) -> str:
        """Every step that is left; returns why it ended: "finished" or "stopped by SIGTERM"."""
        if self.step >= self.job.training.steps:
            self.log.say(
                f"nothing to do: {self.step} of {self.job.training.steps} steps are taken; set training.steps higher "
                "to go on"
            )
        if self.job.training.gc_freq:
            gc.disable()  # a collection on one rank makes all others wait, so all collect at the same step
        try:
            with self.stop:
                return self._steps(Meter(self.job.training.steps))
        finally:
            gc.enable()

    def _steps(self, meter: Meter) -> str:
        job, steps = self.job, self.job.training.steps
        self.watch.step, first = self.step, self.step + 1
        while self.step < steps:
            stop = self._one_step(meter)
            self.watch.step = self.step
            if self.step == first:  # of this process: all is loaded, compiled and connected
                dist.set_timeout(job.comm.train_timeout_seconds, keep=[self.checkpointer.group])
            last = self.step == steps
            if stop or last or self._turn(job.checkpoint.interval):
                self._outside(meter, self._save)
            if stop and not last:
                self._outside(meter, self.checkpointer.wait)
                name = self.stop.name
                self.log.say(f"stopped by {name} after step {self.step}, saved; go on with --resume")
                return f"stopped by {name}"
            if self._turn(job.validation.freq) and not last:
                self._outside(meter, self._validate)
            if self._turn(job.sampling.freq) and not last:
                self._outside(meter, self._sample)
        self._outside(meter, self._finish)
        return "finished"

    def _turn(self, freq: int) -> bool:
        """Whether this step is one of every `freq`; 0 = never."""
        return freq > 0 and self.step % freq == 0

    def close(self, reason: str) -> None:
        """Stop background work and say in run.json how it ended."""
        self.loader.close()
        self.profiler.close()
        self.metrics.close()
        if self.main:
            self.run.end(reason)
        self.log.close()

    def _one_step(self, meter: Meter) -> bool:
        """Take one step, log it when its turn comes; returns whether to stop."""
        job = self.job
        self.optimizers.set_schedule(self.step)
        waiting = time.perf_counter()
        batches = self.loader.next_step()
        waited = time.perf_counter() - waiting
        step_tokens = job.training.global_batch_size * job.training.seq_len
        self.balance.begin_step(step_tokens)
        self.index_losses.begin_step(step_tokens)
        result = train_step(
            self.model,
            batches,
            max_norm=job.training.max_norm,
            chunk_tokens=self.chunk_tokens,
            cross_document_attention=job.data.cross_document_attention,
            stop=bool(self.stop),
        )
        self.balance.end_step(update=result.finite)
        self.index_losses.end_step()
        if result.finite:
            self.optimizers.step()
            if self.qk_clip is not None:
                self.qk_clip.apply()
        self.skipped.add(self.step + 1, result, self.model.named_parameters())
        self.optimizers.zero_grad()
        self.step += 1
        self.tokens += step_tokens
        step_flops = self._flops(batches, step_tokens)
        self.flops += step_flops
        meter.step_done(step_tokens, step_flops, waited)
        self.profiler.step_done()
        if job.training.gc_freq and self.step % job.training.gc_freq == 0:
            gc.collect(1)
        if self.step % job.metrics.log_freq == 0 or self.step in (1, job.training.steps) or result.stop:
            self._log_step(meter, result)
        return result.stop

    def _log_step(self, meter: Meter, result: StepResult) -> None:
        taken = meter.taken
        rates = meter.read(self.step)
        self.seconds += rates["seconds_per_step"] * taken
        peak = peak_flops(self.device)
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
            "train/loss": result.loss,
            **{f"train/mtp_loss_{k}": loss for k, loss in enumerate(result.mtp_losses, 1)},
            "optim/grad_norm": result.grad_norm,
            "optim/lr": self.optimizers.lr,
            "optim/skipped_steps": self.skipped.count,
            "perf/tokens_per_second": rates["tokens_per_second"],
            "perf/data_wait": rates["data_wait"],
            "perf/mfu": None,
            "memory/peak_gib": peak_memory_gib(self.device),
            **{f"data/{key}": value for key, value in self.loader.stats().items()},
            **self.balance.metrics(),
            **self.index_losses.metrics(),
        }
        if peak is not None:
            possible = peak * self.world.size
            record["perf/mfu"] = rates["flops_per_second"] / possible
            everywhere = reachable_keys(self.job.training.seq_len)
            dense = training_flops_per_token(self.arithmetic, everywhere)
            record["perf/mfu_noncausal"] = dense * rates["tokens_per_second"] / possible
        if record["data/cropped"] > 0.5 and not self.warned_of_cropping:
            self.warned_of_cropping = True
            self.log.warn(
                f"data: {100 * record['data/cropped']:.0f}% of the tokens read are cropped away, documents are much "
                'longer than rows of training.seq_len; data.overflow = "split" keeps them'
            )
        self.metrics.write(record)
        self.log.say(step_line(record, self.job.training.steps, rates["eta"]))

    def _flops(self, batches: Sequence[Batch], tokens: int) -> float:
        """Training FLOPs of a step, exact for its documents."""
        seen = attended_keys(batch["positions_BT"] for batch in batches)
        return training_flops_per_token(self.arithmetic, seen) * tokens

    def _validate(self, *, final: bool = False) -> dict[str, Any]:
        """Bits per byte on held-out text, logged; the same rows every time."""
        settings = self.job.validation
        limit = settings.final_max_bytes if final else settings.max_bytes
        began = time.perf_counter()
        result, text = self.heldout.measure(self.model, self.device, self.chunk_tokens, limit)
        found: dict[str, Any] = {
            "val/bpb": result.bpb,
            "val/bytes": result.bytes,
            "val/tokens": result.tokens,
        }
        self.metrics.write({"step": self.step, "tokens": self.tokens, "seconds": self.seconds, **found})
        self.log.say(
            f"eval {self.step:>5}        bpb {result.bpb:.4f}  ({result.bytes:,} bytes of held-out text, "
            f"{duration(time.perf_counter() - began)})"
        )
        if final:
            found["compressors"] = compressor_bpb(text)
        if self.main:
            (self.run.folder / "evals").mkdir(exist_ok=True)
            write_json(self.run.folder / "evals" / f"step_{self.step:06d}.json", {"step": self.step, **found})
        return found

    def _sample(self) -> None:
        completions = continue_prompts(self.job, self.model, self.tokenizer, self.mesh)
        for prompt, completion in zip(self.job.sampling.prompts, completions, strict=True):
            self.log.say(f"sample {self.step:>5}      {json.dumps(prompt)} -> {json.dumps(completion.text)}")
            if self.main:
                with (self.run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"step": self.step, "prompt": prompt, "completion": completion.text})
                        + "\n"
                    )

    def _save(self) -> None:
        if not self.job.checkpoint.enable:
            return
        began = time.perf_counter()
        meta = {
            "stage": "pretrain",
            "tokens": self.tokens,
            "seconds": self.seconds,
            "flops": self.flops,
            "model": spec_to_dict(self.spec),
            "tokenizer_hash": self.tokenizer.hash(),
            "mesh": str(self.mesh),
            "world_size": self.world.size,
            "parents": self.parents,
            "nanovl": __version__,
        }
        rank_state = {
            "data": self.loader.state_dict(),
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        path = self.checkpointer.save(self.step, meta, rank_state, [self.run.config, self.run.tokenizer])
        background = " (goes on in background)" if self.checkpointer.group is not None else ""
        self.log.say(
            f"save {self.step:>5}        {path}  {duration(time.perf_counter() - began)}{background}"
        )

    def _finish(self) -> None:
        """The last evaluation and samples, beside the checkpoint that is already safe."""
        self.checkpointer.wait()
        self.heldout.clear()
        if self.job.validation.freq:
            found = self._validate(final=True)
            for name, bpb in found["compressors"].items():
                self.log.say(f"                  {name} on the same text: {bpb:.4f} bits per byte")
        self._sample()
        self.log.say(
            f"done in {duration(self.seconds)} of training: {self.tokens:,} tokens, {self.flops:.3g} FLOPs"
        )

    def _resume(self, checkpoint: Path, counters: tuple[frozenset[str], frozenset[str]]) -> None:
        restored = self.checkpointer.load(checkpoint, *counters)
        meta = restored.meta
        self.step, self.tokens = meta["step"], meta["tokens"]
        self.seconds, self.flops = meta["seconds"], meta["flops"]
        self.loader.load_state_dict([state["data"] for state in restored.ranks])
        if self.world.rank < len(restored.ranks):
            rng = base64.b64decode(restored.ranks[self.world.rank]["rng"])
            torch.set_rng_state(torch.frombuffer(bytearray(rng), dtype=torch.uint8))
        self.log.say(f"  resume    {checkpoint} (step {self.step}){told(*counters)}")

    def _checkpoint_to_resume(self, resume: bool) -> Path | None:
        """The newest complete checkpoint, as rank 0 sees it; None = from the start."""
        found = committed(self.run.checkpoints)[-1:] if resume and self.main else []
        path: Path | None = dist.broadcast_object(found[0] if found else None)
        if resume and path is None:
            self.log.warn(
                f"  resume    {self.run.checkpoints} holds no complete checkpoint: starting at step 0"
            )
        return path

    def _outside(self, meter: Meter, work: Callable[[], object]) -> None:
        """Do what is not training, off the clock and with the patience that it needs."""
        comm = self.job.comm
        meter.pause_clock()
        with dist.patience(
            comm.outside_timeout_seconds, comm.train_timeout_seconds, keep=[self.checkpointer.group]
        ):
            work()
        meter.resume_clock()
