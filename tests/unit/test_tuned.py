from tests.benchmarks.tuned import SEEDS, TUNING_SEED, Piece, Policy, Table, combinations


def row(piece, loss):
    return {**vars(piece), "loss": loss}


def test_a_sweep_then_its_variations_then_the_seeds(tmp_path):
    """Nothing is reported before all has been tried, and the reported seeds choose nothing."""
    one = Policy("one", combinations(rate=[1, 2], outer=["mean"]), None, (8, 2), {"outer": ["nesterov"]})
    two = Policy("two", combinations(rate=[3]), None)
    table = Table(tmp_path / "results.json", "", "", [one, two], run=lambda policy, piece: {})
    first, second, other = table.missing([], [one, two])
    assert [piece.setting.get("rate") for piece in (first, second, other)] == [1, 2, 3]
    assert {piece.seed for piece in (first, second, other)} == {TUNING_SEED}
    rows = [row(first, 0.5)]
    assert list(table.missing(rows, [one])) == [second] and table.best(rows, one) is None
    rows.append(row(second, 0.4))
    [varied] = table.missing(rows, [one])
    assert varied == Piece("one", 8, TUNING_SEED, {"rate": 2, "outer": "nesterov"})
    assert table.best(rows, one) is None
    rows.append(row(varied, 0.6))
    assert table.best(rows, one) == second.setting
    reported = [Piece("one", count, seed, second.setting) for count in (8, 2) for seed in SEEDS]
    assert list(table.missing(rows, [one, two])) == [other, *reported]
    rows.append(row(reported[0], 0.1))  # which is not of the sweep
    assert table.best(rows, one) == second.setting
    assert list(table.missing(rows, [one])) == reported[1:]
