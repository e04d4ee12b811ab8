"""The tasks of a calibrating child process. Imported in children only, since it imports torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ggtool.calibration.calibrated_model import calibrate_model
from ggtool.calibration.gguf_gptq.model import Plan, quantize_model
from ggtool.calibration.gguf_gptq.survey import Asked
from ggtool.calibration.gguf_gptq.survey import survey as gguf_survey
from ggtool.calibration.gradient_sums import gradient_sums
from ggtool.calibration.jobs import GgufSurveyJob, GradientJob, PackJob, RoundJob, SurveyJob
from ggtool.calibration.torch_survey import survey as survey_matrices
from ggtool.quantizers.saving import make_quantizer, save_quantized
from ggtool.system.progress import Progress
from ggtool.system.worker import Outcome

if TYPE_CHECKING:
    from ggtool.quantizers.tables import TableQuantizer


def pack(job: PackJob, progress: Progress) -> Outcome:
    """Quantize a checkpoint with calibration and save it."""
    assert job.format.quantizer is not None
    assert job.format.method is not None
    torch.set_num_threads(job.threads)
    model = calibrate_model(
        job.source,
        cast("TableQuantizer", make_quantizer(job.format.quantizer)),
        job.format.method,
        torch.from_numpy(np.load(job.chunks)).long(),
        job.device,
        job.components,
        progress,
    )
    save_quantized(model, job.out, job.facts, job.source, force=job.force)
    return Outcome({}, {}, {})


def survey(job: SurveyJob, progress: Progress) -> Outcome:
    """Measure what each matrix of a checkpoint loses in each format."""
    torch.set_num_threads(job.threads)
    chunks = torch.from_numpy(np.load(job.chunks)).long()
    return Outcome(asdict(survey_matrices(job.source, chunks, job.device, progress)), {}, {})


def round_gguf(job: RoundJob, progress: Progress) -> Outcome:
    """Round a checkpoint's matrices to GGUF's tensor types."""
    torch.set_num_threads(job.threads)
    importance = load_file(job.importance)
    chunks = torch.from_numpy(np.load(job.chunks)).long()
    plan = Plan(job.types, importance, job.folder, job.threads, job.present)
    quantize_model(job.source, plan, chunks, job.device, progress)
    return Outcome({}, {}, {})


def survey_gguf(job: GgufSurveyJob, progress: Progress) -> Outcome:
    """Measure what each matrix of a checkpoint costs in GGUF's tensor types."""
    torch.set_num_threads(job.threads)
    chunks = torch.from_numpy(np.load(job.chunks)).long()
    asked = Asked(job.types, load_file(job.importance), job.threads)
    return Outcome(dict(gguf_survey(job.source, asked, chunks, job.device, progress)), {}, {})


def weigh_inputs(job: GradientJob, progress: Progress) -> Outcome:
    """Sum up squared inputs, weighed with squared gradients."""
    torch.set_num_threads(job.threads)
    chunks = torch.from_numpy(np.load(job.chunks)).long()
    sums = gradient_sums(job.source, chunks, job.device, output=job.output, seed=0, progress=progress)
    save_file(sums, job.out)
    return Outcome({}, {}, {})
