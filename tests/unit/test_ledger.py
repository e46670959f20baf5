from system.influence.design.design import InterventionRun
from system.influence.measure.ledger import Ledger


def runs(replications=1, sources=3, warm=False):
    found = []
    for replication in range(replications):
        if warm:
            found.append(InterventionRun(replication=replication, kind="warm", source=-1))
        found.append(InterventionRun(replication=replication, kind="reference", source=-1))
        found += [
            InterventionRun(replication=replication, kind="remove", source=j)
            for j in range(sources)
        ]
    return found


def drain(ledger):
    """Trains and scores everything, one at a time; names in the order of training."""
    order = []
    while not ledger.is_done:
        run = ledger.next_to_train()
        if run is not None:
            order.append(run.name)
            ledger.trained(run)
            continue
        ready = ledger.next_to_score()
        assert ready is not None, "nothing to train and nothing to score, yet not done"
        ledger.scored(ready)
    return order


def test_every_unit_is_trained_once_and_scored_once():
    made = runs(replications=2)
    order = drain(Ledger(made, trained=(), scored=(), max_checkpoints=2))
    assert sorted(order) == sorted(run.name for run in made)


def test_no_more_checkpoints_wait_than_allowed():
    ledger = Ledger(runs(), trained=(), scored=(), max_checkpoints=2)
    first, second = ledger.next_to_train(), ledger.next_to_train()
    assert first and second and ledger.next_to_train() is None
    ledger.trained(first)
    assert ledger.next_to_train() is None
    ready = ledger.next_to_score()
    assert ready == first and ledger.next_to_train() is None
    ledger.scored(first)
    assert ledger.next_to_train() is not None


def test_what_is_scored_is_not_made_again():
    made = runs()
    done = {made[0].name, made[2].name}
    order = drain(Ledger(made, trained=(), scored=done, max_checkpoints=2))
    assert order == [made[1].name, made[3].name]


def test_a_checkpoint_that_is_there_is_scored_without_training():
    made = runs()
    ledger = Ledger(made, trained={made[1].name}, scored=(), max_checkpoints=2)
    assert ledger.next_to_score() == made[1]
    ledger.scored(made[1])
    assert made[1].name not in drain(ledger)


def test_branches_wait_for_their_own_warm_up():
    made = runs(replications=2, warm=True)
    ledger = Ledger(made, trained=(), scored=(), max_checkpoints=9)
    first, second = ledger.next_to_train(), ledger.next_to_train()
    assert first and second and {first.kind, second.kind} == {"warm"}
    assert ledger.next_to_train() is None
    ledger.trained(second)
    following = ledger.next_to_train()
    assert following is not None and following.replication == second.replication


def test_a_warm_up_whose_branches_are_scored_is_not_made_again():
    made = runs(replications=2, warm=True)
    scored = {run.name for run in made if run.replication == 0 and run.kind != "warm"}
    order = drain(Ledger(made, trained=(), scored=scored, max_checkpoints=3))
    assert all(name.startswith("r01") for name in order)


def test_nothing_left_is_done():
    made = runs(warm=True)
    ledger = Ledger(
        made, trained=(), scored={u.name for u in made if u.kind != "warm"}, max_checkpoints=1
    )
    assert ledger.is_done and ledger.next_to_train() is None


def test_replications_count_as_scored_in_order_and_whole():
    made = runs(replications=3)
    ledger = Ledger(made, trained=(), scored=(), max_checkpoints=99)
    assert ledger.num_scored_replications(3) == 0
    for run in made:
        if run.replication != 1:
            ledger.scored(run)
    assert ledger.num_scored_replications(3) == 1, "a gap ends the count"
    for run in made[4:7]:
        ledger.scored(run)
    assert ledger.num_scored_replications(3) == 1
    ledger.scored(made[7])
    assert ledger.num_scored_replications(3) == 3 and ledger.num_scored_replications(2) == 2


def test_gradients_wait_for_their_warm_up_and_are_scored_as_they_are_taken():
    warm = InterventionRun(replication=0, kind="warm", source=-1)
    parts = [InterventionRun(replication=0, kind="gradient", source=part) for part in range(2)]
    ledger = Ledger([warm, *parts], trained=(), scored=(), max_checkpoints=1)
    assert ledger.next_to_train() == warm and ledger.next_to_train() is None
    ledger.trained(warm)
    for part in parts:
        assert ledger.next_to_train() == part
        assert ledger.next_to_train() is None and ledger.next_to_score() is None
        ledger.scored(part)
    assert ledger.is_done
