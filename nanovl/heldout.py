"""Bits per byte of a model in training on its job's held-out text."""

from __future__ import annotations

import torch

from nanovl.config.schema import Job
from nanovl.data.documents import heldout_texts
from nanovl.data.loader import heldout_rows
from nanovl.eval.bpb import BitsPerByte, bits_per_byte
from nanovl.mesh import Mesh
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.spec import Batch
from nanovl.step import sum_over_ranks
from nanovl.tokenizer.bpe import AnyTokenizer


class Heldout:
    """Measures; the same rows every time."""

    def __init__(self, job: Job, tokenizer: AnyTokenizer, mesh: Mesh) -> None:
        self.job, self.tokenizer, self.mesh = job, tokenizer, mesh
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes()).long()
        self._rows: dict[int, tuple[list[Batch], bytes]] = {}

    def measure(
        self, model: ParallelModel, device: torch.device, chunk_tokens: int, max_bytes: int
    ) -> tuple[BitsPerByte, bytes]:
        """On whole documents of about `max_bytes`, which come along; every rank takes part."""
        if max_bytes not in self._rows:
            self._rows[max_bytes] = self._read(max_bytes)
        batches, text = self._rows[max_bytes]
        model.train(False)
        result = bits_per_byte(
            model.evaluate,
            batches,
            self.token_bytes,
            device,
            total=lambda sums: sum_over_ranks(self.mesh, *sums),
            chunk_tokens=chunk_tokens,
        )
        model.train(True)
        return result, text

    def clear(self) -> None:
        """Let go of the rows."""
        self._rows.clear()

    def _read(self, max_bytes: int) -> tuple[list[Batch], bytes]:
        job, mesh = self.job, self.mesh
        rows = job.validation.local_batch_size or job.training.local_batch_size or 8
        return heldout_rows(
            heldout_texts(job),
            self.tokenizer,
            job.training.seq_len,
            max_bytes,
            mesh.data_rank,
            mesh.data_degree,
            rows,
        )
