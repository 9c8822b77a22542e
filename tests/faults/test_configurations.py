"""Malformed configurations and command lines are refused by name, before anything is built."""

from benchmarks.faults.configurations import trials

TRIALS = trials()


def test_every_malformed_configuration_and_flag_is_refused_by_name(tmp_path):
    failed = []
    for number, trial in enumerate(trial for trial in TRIALS if trial.compact):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = trial.run(folder)
        if not outcome.is_acceptable:
            failed.append(f"{trial.name}: {outcome.verdict}: {outcome.detail[:200]}")
    assert not failed, f"{len(failed)} of {number + 1}:\n" + "\n".join(failed)
