"""Saved on 2 processes x 4 devices, resumed on others: the same batches, the same losses."""

import pytest
from processes import losses, run

# Of the loss: sums of float32 in another order, over eight steps. Processes add up in another
# order than the devices of one, so the same mesh in one process is no exception.
TOLERANCE = 2e-5


def resumed(place, workdir, *flags, **how) -> dict[int, float]:
    for process in run(place, workdir, *flags, **how):
        assert process.popen.returncode == 0, process.log()
    return losses(place, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 8), (4, 1), (1, 1)])
def test_other_meshes_are_equal_within_rounding(
    place, undisturbed, from_step_4, processes, devices
):
    mesh = f"--config.mesh.fsdp={processes * devices}"
    after = resumed(place, from_step_4, mesh, processes=processes, devices=devices)
    before = losses(place, undisturbed)
    assert after.keys() == before.keys()
    for step, loss in before.items():
        assert after[step] == (loss if step <= 4 else pytest.approx(loss, rel=TOLERANCE)), step


@pytest.mark.slow
def test_evaluation_on_two_processes_is_that_of_one(place, undisturbed):
    flags = [
        f"--checkpoint={place / undisturbed}",
        "--batches=2",
        "--prompt_tokens=4",
        "--decode_tokens=2",
    ]
    lines = []
    for processes, devices in ((2, 4), (1, 1)):
        first = run(place, "", *flags, script="eval.py", processes=processes, devices=devices)[0]
        assert first.popen.returncode == 0, first.log()
        lines.append([line for line in first.out if line.startswith(("loss", "bits"))])
    assert lines[0] == lines[1] and len(lines[0]) == 2
