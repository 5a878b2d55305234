"""A stream of Hugging Face `datasets` over processes: the same batches on any number of them."""

import json
import shutil

import pytest
from processes import losses, run
from test_elastic import TOLERANCE

MESH = "--config.mesh.fsdp=2"


@pytest.mark.slow
def test_a_stream_goes_on_with_another_number_of_processes(place):
    pytest.importorskip("datasets")
    folder = place / "stream"
    folder.mkdir()
    for shard in range(2):
        lines = [json.dumps({"text": f"{shard}: document {i} " * (i % 9)}) for i in range(60)]
        (folder / f"train-{shard}.jsonl").write_text("\n".join(lines))
    stream = "--config.data.sources.main"
    flags = [
        MESH,
        f"{stream}.kind=hf",
        f"{stream}.path={folder}",
        f"{stream}.stream.validation_documents=9",
        f"{stream}.stream.shuffle_documents=16",
    ]
    for process in run(place, "streamed", *flags, processes=2, devices=2):
        assert process.popen.returncode == 0, process.log()
    before = losses(place, "streamed")
    shutil.copytree(place / "streamed", place / "alone")
    for step in ("8", "12"):
        shutil.rmtree(place / "alone" / "checkpoints" / step)
    for process in run(place, "alone", *flags, devices=4):
        assert process.popen.returncode == 0, process.log()
    after = losses(place, "alone")
    assert after.keys() == before.keys() and len(after) == 12
    for step, loss in before.items():
        assert after[step] == (loss if step <= 4 else pytest.approx(loss, rel=TOLERANCE)), step
