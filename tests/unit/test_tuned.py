from tests.benchmarks.tuned import SEEDS, TUNING_SEED, Piece, Policy, Table


def row(piece, loss):
    return {**vars(piece), "loss": loss}


def test_a_policy_is_tuned_until_nothing_around_the_best_is_better(tmp_path):
    """The program finds the least of a bowl; nothing is reported before, and the reported seeds choose nothing."""
    grid = {"rate": [1, 2, 4, 8, 16], "batch": [8, 16]}
    one = Policy("one", {"rate": 2, "batch": 16}, grid, None, (8, 2))
    table = Table(tmp_path / "results.json", "", "", [one], run=lambda policy, piece: {})
    rows = []
    while pieces := [piece for piece in table.missing(rows, [one]) if piece.seed == TUNING_SEED]:
        assert {(piece.replicas, piece.seed) for piece in pieces} == {(8, TUNING_SEED)}
        assert list(table.missing(rows, [one])) == pieces and table.best(rows, one) is None
        rows += [row(piece, abs(piece.setting["rate"] - 8) + piece.setting["batch"]) for piece in pieces]
    best = {"rate": 8, "batch": 8}
    assert table.best(rows, one) == best
    tried = {(each["setting"]["rate"], each["setting"]["batch"]) for each in rows}
    assert tried >= {(4, 8), (16, 8), (8, 16)} and len(tried) < 10
    reported = [Piece("one", count, seed, best) for count in (8, 2) for seed in SEEDS]
    assert list(table.missing(rows, [one])) == reported
    rows.append(row(reported[0], 0.1))
    assert table.best(rows, one) == best
    assert list(table.missing(rows, [one])) == reported[1:]


def test_what_is_no_longer_in_the_grid_is_no_candidate(tmp_path):
    one = Policy("one", {"rate": 2}, {"rate": [2, 4]}, None)
    table = Table(tmp_path / "results.json", "", "", [one], run=lambda policy, piece: {})
    rows = [row(Piece("one", 8, TUNING_SEED, {"rate": rate}), loss) for rate, loss in ((1, 0.1), (2, 0.3), (4, 0.4))]
    assert table.best(rows, one) == {"rate": 2}


def test_policies_are_tuned_before_any_is_reported(tmp_path):
    one, two = (Policy(name, {"rate": 1}, {"rate": [1]}, None) for name in ("one", "two"))
    table = Table(tmp_path / "results.json", "", "", [one, two], run=lambda policy, piece: {})
    first, second = table.missing([], [one, two])
    left = list(table.missing([row(first, 1.0)], [one, two]))
    assert left == [second, *(Piece("one", 8, seed, {"rate": 1}) for seed in SEEDS)]
