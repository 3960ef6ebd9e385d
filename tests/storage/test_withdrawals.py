from sqlalchemy import event

from storage.ledger import Ledger


def test_names_are_those_of_all_who_withdrew_whoever_recorded_it(engine, ledger):
    other = Ledger(engine)
    assert ledger.withdrawals.names() == frozenset()
    other.withdrawals.add("north", "me", "")
    assert ledger.withdrawals.names() == {"north"}
    other.withdrawals.add("south", "me", "")
    other.withdrawals.add("north", "you", "again")
    assert ledger.withdrawals.names() == {"north", "south"} == ledger.withdrawals.all().keys()


def test_names_are_read_once_while_nobody_withdraws(engine, ledger):
    ledger.withdrawals.add("north", "me", "")
    said = []
    event.listen(engine, "after_cursor_execute", lambda *call: said.append(call[2]))
    assert [ledger.withdrawals.names() for _ in range(3)] == [{"north"}] * 3
    assert sum("SELECT withdrawals.client" in statement for statement in said) == 1
