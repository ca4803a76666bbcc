import time
from pathlib import Path

from quantize import pipeline
from quantize.checkpoint import open_checkpoint

ck = open_checkpoint(Path("/tmp/w/bench/2b-f16.gguf"))
t = time.time()
c = time.process_time()
print(
    pipeline.quantize(ck, Path("/tmp/w/q/rtn2b.gemma"), bits=4, method="rtn", force=True),
    "wall",
    time.time() - t,
    "cpu",
    time.process_time() - c,
)
