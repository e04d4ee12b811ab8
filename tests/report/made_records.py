"""Records of one model as a sweep leaves them, with the numbers that a test wants."""

from __future__ import annotations

from dataclasses import replace

from sample_record import MIB, RECORD

from ggtool.formats import label
from ggtool.results.records import Disturbance, EvalRecord

FP32 = "hf-fp32"
ENVIRONMENT = {"device": "cpu", "cpu": "Test CPU", "threads": "2", "ggtool": "0.1.0"}


def record(
    name: str,
    mib: float,
    kld: float | None = None,
    kld_stderr: float = 0.001,
    *,
    ratio: float = 1.0,
    ratio_stderr: float = 0.001,
    tg_ts: float = 100.0,
    spread: float = 0.05,
    test_time: str = "2026-01-01T00:00:00+00:00",
    **changes,
) -> EvalRecord:
    """A measured format of `mib` MiB; its rounds spread by so much either way of `tg_ts`."""
    backend, _, components = name.partition(":")
    size = round(mib * MIB)
    far = replace(
        RECORD.divergence,
        kld_mean=kld or 0.0,
        kld_stderr=kld_stderr,
        ppl_ratio=ratio,
        ppl_ratio_stderr=ratio_stderr,
    )
    made = replace(
        RECORD,
        format=backend,
        components=components or "all",
        artifact=f"m-{backend}",
        model_size=size,
        model_n_params=8 * MIB,
        bpw=size / MIB,
        perplexity=replace(RECORD.perplexity, ppl=36.0 * ratio, ppl_stderr=0.9),
        divergence=None if kld is None else far,
        speed=replace(
            RECORD.speed, tg_ts=tg_ts, tg_ts_p5=tg_ts * (1 - spread), tg_ts_p95=tg_ts * (1 + spread)
        ),
        memory=replace(
            RECORD.memory, weights_bytes=size, peak_rss_bytes=size + 100 * MIB, base_rss_bytes=50 * MIB
        ),
        environment=ENVIRONMENT,
        test_time=test_time,
    )
    assert made.label == label(backend, components or "all") == name
    return replace(made, **changes)


def disturbed(made: EvalRecord, **changes) -> EvalRecord:
    """The same record, timed while other processes took half of the CPUs' time."""
    found = {"rounds": 5, "disturbed": 5, "repeated": 5, "causes": ("others",), "others": 0.5} | changes
    return replace(made, speed=replace(made.speed, disturbance=Disturbance(**found)))


def failed(name: str, reason: str) -> EvalRecord:
    """A format that could not be measured."""
    gone = {"perplexity": None, "divergence": None, "speed": None, "memory": None, "model_size": 0}
    return record(name, 1.0, failure=reason, **gone)


# Before, two parts, and a ladder in which q5_k_m beats bnb-nf4, and iq4_xs cannot be told from q4_k_m.
RECORDS = (
    record(FP32, 32.0, tg_ts=50.0),
    record("scratch-int8", 8.6, 0.0006, 0.0001, tg_ts=60.0),
    record("scratch-int8:attn", 26.0, 0.0002, 0.00002, tg_ts=55.0),
    record("scratch-int8:ffn", 20.0, 0.0004, 0.00002, tg_ts=55.0),
    record("scratch-int4", 6.0, 0.060, 0.001, ratio=1.06),
    record("scratch-nf4", 6.0, 0.040, 0.001, ratio=1.04),
    record("bnb-int8", 14.0, 0.002, 0.0001),
    record("bnb-nf4", 12.0, 0.036, 0.001, ratio=1.03, modules_quantized=24, modules_total=25, tg_ts=20.0),
    record("gguf-q8_0", 9.0, 0.0010, 0.0001, tg_ts=300.0),
    record("gguf-q5_k_m", 6.2, 0.010, 0.001, ratio=1.01, tg_ts=330.0),
    record("gguf-q4_k_m", 5.5, 0.0300, 0.001, ratio=1.03, tg_ts=400.0),
    record("gguf-iq4_xs", 5.4, 0.0310, 0.001, ratio=1.03, tg_ts=395.0),
    record("gguf-q2_k", 4.0, 0.30, 0.004, ratio=1.3, tg_ts=350.0),
)


def on_gpu(made: EvalRecord, vram: float) -> EvalRecord:
    """The same record, measured on a GPU of which the process held `vram` MiB."""
    held = round(vram * MIB)
    memory = replace(
        made.memory,
        peak_vram_bytes=held // 2,
        peak_vram_allocated_bytes=held // 4,
        vram_process_bytes=held,
    )
    return replace(
        made,
        memory=memory,
        environment={**ENVIRONMENT, "device": "cuda", "cuda_device": "Test GPU"},
    )
