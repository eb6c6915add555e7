"""What a worker has printed, cut into lines, progress bars and the error line."""

import pytest

from dist_partial.launch import output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", ([], b"", "")),
        (b"part", ([], b"part", "")),
        (b"one\ntwo\nthr", ([b"one", b"two"], b"thr", "")),
        (b"dos\r\nnext", ([b"dos"], b"next", "")),
        (b"\r 10%|", ([], b"\r 10%|", "10%|")),
        (b" 10%\r", ([], b" 10%\r", "10%")),
        (b"\r 10%|\r 20%|", ([], b" 10%|\r 20%|", "20%|")),
        (b" 10%\r 20%\r", ([], b" 20%\r", "20%")),
        (b"\r 20%|\r      \r", ([], b"      \r", "")),
        (b"\r 20%|\r      \rtext\n\r 20%|", ([b"text"], b"\r 20%|", "20%|")),
        (b"\r100%|##|\n", ([b"100%|##|"], b"", "")),
        (b"\n\n", ([b"", b""], b"", "")),
    ],
)
def test_split(text, expected):
    assert output.split(text) == expected
    # However the pipe cuts it, the same lines come out.
    lines, rest = [], b""
    for i in range(len(text)):
        more, rest, bar = output.split(rest + text[i : i + 1])
        lines += more
    if text:
        assert (lines, bar) == (expected[0], expected[2])


def test_workers_that_end_by_one_mistake_say_it_once(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        console = output.Console(out=file.fileno(), err=file.fileno())
        for worker in (1, 0, 1):
            console.show(worker, [b"step 1", b"error: run.data is None", b"error: worker %d" % worker])
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert lines[:3] == [b"[1] step 1", b"[1] error: run.data is None", b"[1] error: worker 1"]
    assert lines[3:5] == [b"[0] step 1", b"[0] error: worker 0"]
    assert lines[5:] == lines[:3]
