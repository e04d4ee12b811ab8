"""One record with every part filled, for tests of what is done with records."""

from ggtool.results.records import Divergence, EvalRecord, MemoryUsage, Perplexity, Speed

MIB = 2**20
RECORD = EvalRecord(
    model="m",
    revision="",
    format="scratch-int8",
    components="blocks=-4..-1.attn",
    artifact="m",
    artifact_sha256="a" * 64,
    model_size=11 * MIB,
    model_n_params=20,
    bpw=4.25,
    modules_quantized=1,
    modules_total=2,
    corpus="c.txt",
    text_sha256="b" * 64,
    tokens_sha256="c" * 64,
    perplexity=Perplexity(36.1, 0.5, 80.2, 1.1, 2.2, 0.1, 1.1, 3.58, 100, 80.5, 400, 2, 512, 0, "llama"),
    divergence=Divergence("hf-fp32", "d" * 64, 100, 0.0125, *[0.0] * 10, 0.987, 0.01, 1.0, 0.1, 36.0),
    speed=Speed(1000.0, 75.5, 0.25, 1.75, 256, 32, 256, 5, 2),
    memory=MemoryUsage(11 * MIB, 5, 1, 2, 333 * MIB),
    environment={"device": "cpu", "threads": "2"},
    test_time="2026-01-01T00:00:00+00:00",
)
