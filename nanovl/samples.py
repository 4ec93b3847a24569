"""What a model in training makes of its job's prompts."""

from __future__ import annotations

from functools import partial

from nanovl.config.schema import Job
from nanovl.inference.engine import Engine
from nanovl.inference.request import Completion
from nanovl.inference.uncached import generate_uncached
from nanovl.mesh import Mesh
from nanovl.parallelisms.parallel_model import ParallelModel
from nanovl.tokenizer.bpe import AnyTokenizer


def continue_prompts(job: Job, model: ParallelModel, tokenizer: AnyTokenizer, mesh: Mesh) -> list[Completion]:
    """One completion a prompt, with the weights as they are; every rank takes part."""
    settings = job.sampling
    if not settings.prompts:
        return []
    if mesh.whole_model_here:
        generate = Engine(model.whole, tokenizer, max_rows=len(settings.prompts)).generate
    else:
        generate = partial(generate_uncached, model, tokenizer)
    return generate(
        settings.prompts,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=job.debug.seed,
    )
