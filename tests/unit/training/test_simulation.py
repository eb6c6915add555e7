"""The simulated run against closed forms, and against a simulation that follows each pack and each worker by itself."""

import itertools
import math

import numpy as np
import pytest

from dist_partial.training.simulation import Exchange, Faults, Hosts, Work, simulate, with_faults


def plain(work, hosts, devices, times):
    """The end of the last step of replicas that add up gradients in every step: [steps, hosts, devices] of times."""
    now = 0.0
    for step in times:
        slowest = step.max()
        forward = work.forward * slowest / work.step
        inside = between = now
        for pack in range(1, work.packs + 1):
            ready = now + forward + (slowest - forward) * pack / work.packs
            inside = max(inside, ready) + work.inside / work.packs
            between = max(between, inside) + work.between / work.packs
        now = between + work.waits
    return now / len(times)


@pytest.mark.parametrize("packs", [1, 2, 7])
@pytest.mark.parametrize(("inside", "between"), [(0.0, 0.02), (0.03, 0.02), (0.0, 0.5), (0.7, 0.5)])
def test_gradients_travel_while_the_backward_pass_computes_others(packs, inside, between):
    work = Work(forward=0.03, step=0.1, packs=packs, inside=inside, between=between, waits=0.001)
    found = simulate(work, Hosts(3, 2, stragglers=[(1, 1.25)]), steps=5).step
    times = np.full((5, 3, 2), 0.1)
    times[:, 0] *= 1.25
    assert found == pytest.approx(plain(work, 3, 2, times), rel=1e-3)


@pytest.mark.parametrize("count", [1, 10, 300])
def test_a_step_waits_for_the_slowest_replica(count):
    """One step in a hundred takes three times as long: with probability 1 - 0.99^N somebody's."""
    spread = [1.0] * 99 + [3.0]
    found = simulate(Work(0.0, 1.0, waits=1e-9), Hosts(count, spread=spread), steps=2000).step
    chance = 1 - 0.99**count
    assert found == pytest.approx(1 + 2 * chance, abs=4 * 2 * math.sqrt(chance * (1 - chance) / 2000) + 1e-6)


def test_between_exchanges_nobody_waits():
    """Slow steps add up over the steps between two exchanges, and are rarely all those of one worker."""
    spread, exchange = [1.0] * 9 + [2.0], Exchange(every=50, wire=1.0)
    together = simulate(Work(0.0, 1.0, waits=1e-9), Hosts(64, spread=spread)).step
    apart = simulate(Work(0.0, 1.0, exchanges=(exchange,)), Hosts(64, spread=spread)).step
    times = np.random.default_rng(5).choice(spread, (400, 50, 64))
    assert together > 1.99
    assert apart == pytest.approx(times.sum(1).max(1).mean() / 50 + 1 / 50, rel=0.01)


@pytest.mark.parametrize(("delay", "wire", "step"), [(0, 0.8, 1.2), (3, 0.8, 1.0), (3, 4.0, 1.25), (4, 6.0, 1.5)])
def test_what_travels_while_steps_are_made_takes_no_time(delay, wire, step):
    """Every 4 steps: as far as the steps of the delay last."""
    work = Work(0.0, 1.0, exchanges=(Exchange(4, delay=delay, wire=wire),))
    assert simulate(work, Hosts(5), steps=2000).step == pytest.approx(step, rel=0.003)


def test_a_warm_up_exchanges_in_every_step():
    work = Work(0.0, 1.0, exchanges=(Exchange(10, delay=5, warm_up=20, wire=1.0),))
    assert simulate(work, Hosts(2), steps=40).step == pytest.approx((40 + 20) / 40)


def test_a_short_warm_up_of_a_long_run_weighs_little():
    work = Work(0.0, 1.0, exchanges=(Exchange(334, warm_up=1000, wire=10.0),))
    assert simulate(work, Hosts(2), steps=100_000).step == pytest.approx(1 + 0.01 * 10 + 0.99 * 10 / 334)


def test_fragments_that_take_turns_share_the_links():
    one_after_the_other = [Exchange(4, offset, delay=4, wire=2.0) for offset in range(4)]
    work = Work(0.0, 1.0, exchanges=tuple(one_after_the_other))
    assert simulate(work, Hosts(2), steps=2000).step == pytest.approx(2.0, rel=0.01)  # 8 s of wire in 4 steps


@pytest.mark.parametrize(("every", "restart"), [(10, 5.0), (100, 5.0), (100, 60.0)])
def test_faults_cost_what_theory_says(every, restart):
    """Daly 2006, "A higher order estimate of the optimum checkpoint interval": e^(R/M) M (e^(t/M) - 1) a segment."""
    mean, steps = 400.0, 3_000_000
    found = simulate(Work(0.0, 1.0), Hosts(10, faults=Faults(10 * mean, restart, every)), steps=steps)
    expected = math.exp(restart / mean) * mean * math.expm1(every / mean) * steps / every
    assert found.seconds == pytest.approx(expected, rel=0.03)
    assert found.goodput == pytest.approx(steps / expected, rel=0.03)
    assert found.faults == pytest.approx(expected / mean, rel=0.05)


def test_who_rejoins_loses_no_step_but_the_one_that_is_made():
    faults = Faults(restart_seconds=10, checkpoint_every=100, rejoin=True)
    found = with_faults(1.0, 200, faults, iter([150.5, 30.0]))
    assert (found.seconds, found.faults) == (200 + 0.5 + 10 + 10, 2)
    again = with_faults(1.0, 200, Faults(restart_seconds=10, checkpoint_every=100), iter([150.5, 30.0]))
    assert again.seconds == 150.5 + 10 + 20 + 10 + 100


def test_a_fault_while_all_restart_begins_the_restart_anew():
    found = with_faults(1.0, 10, Faults(restart_seconds=8, checkpoint_every=1), iter([4.0, 3.0, 100.0]))
    assert (found.seconds, found.faults) == (4 + 3 + 8 + 6, 2)


def test_a_run_that_fails_before_any_checkpoint_never_ends():
    found = with_faults(1.0, 1000, Faults(restart_seconds=1, checkpoint_every=100), itertools.repeat(50.0))
    assert (found.seconds, found.goodput) == (math.inf, 0.0)


def test_the_same_seed_gives_the_same_answer_and_another_one_another():
    work, hosts = Work(0.0, 1.0, waits=0.1), Hosts(1000, 10, [1.0, 1.1, 1.5], faults=Faults(1e5, 3.0, 10))
    first, again, other = (simulate(work, hosts, 3000, seed) for seed in (1, 1, 2))
    assert first == again != other
