"""What SLURM is asked and told; its answers here are copied from a real one, 22.05."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from clpeft import slurm
from clpeft.config import ConfigError
from clpeft.slurm import SlurmSettings, reason, requeue_if_asked, sbatch_options, states, why_ended
from clpeft.stopping import Preempted

SETTINGS = SlurmSettings(
    _target_="",
    folder="",
    name="clpeft",
    timeout_min=90,
    gpus_per_node=0,
    array_parallelism=4,
    signal_delay_s=60,
)

Call = Callable[..., str]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Exception], list[tuple[str, ...]]]:
    """Gives SLURM's commands an answer, and the list of what they were called with."""

    def give(told: str | Exception) -> list[tuple[str, ...]]:
        called: list[tuple[str, ...]] = []

        def call(*command: str) -> str:
            called.append(command)
            if isinstance(told, Exception):
                raise told
            return told

        monkeypatch.setattr(slurm, "call", call)
        return called

    return give


@pytest.fixture
def term_as_before() -> object:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_what_is_not_set_is_left_to_the_cluster() -> None:
    assert sbatch_options(SETTINGS) == {
        "job-name": "clpeft",
        "time": 90,
        "requeue": True,
        "open-mode": "append",
    }


def test_options_of_a_job() -> None:
    settings = SlurmSettings(
        **vars(SETTINGS)
        | {
            "partition": "gpu",
            "account": "me",
            "gpus_per_node": 2,
            "cpus_per_task": 8,
            "mem_gb": 1.5,
            "requeue": False,
            "additional_parameters": {"nice": 100, "time": 5},
        }
    )
    assert sbatch_options(settings) == {
        "job-name": "clpeft",
        "partition": "gpu",
        "account": "me",
        "time": 5,  # what is given as such goes before
        "gpus-per-node": 2,
        "cpus-per-task": 8,
        "mem": "1536M",
        "no-requeue": True,
        "open-mode": "append",
        "nice": 100,
    }


def test_states_of_jobs(answer: Callable[..., list[tuple[str, ...]]]) -> None:
    called = answer("9_0 RUNNING\n9_1 PENDING\n9_2 PENDING\n12 COMPLETING\n")

    assert states(["9_0", "9_2", "9_3", "12"]) == {
        "9_0": "RUNNING",
        "9_2": "PENDING",
        "12": "COMPLETING",
    }
    # by array, because squeue refuses an element that is gone
    assert called == [("squeue", "--noheader", "--array", "--format=%i %T", "--jobs=12,9")]


def test_states_of_no_jobs_ask_nobody(answer: Callable[..., list[tuple[str, ...]]]) -> None:
    called = answer("")

    assert states([]) == {}
    assert called == []


def test_forgotten_job_is_not_in_the_queue(answer: Callable[..., list[tuple[str, ...]]]) -> None:
    answer(ConfigError("squeue failed: slurm_load_jobs error: Invalid job id specified."))
    assert states(["7_0"]) == {}

    answer(ConfigError("squeue failed: Unable to contact slurm controller."))
    with pytest.raises(ConfigError, match="Unable to contact"):
        states(["7_0"])


SHOWN = (
    "JobId=7 JobName=clpeft JobState={state} Reason=None Requeue=1 Restarts={restarts} "
    "TimeLimit={limit} StartTime=2026-11-21T13:09:43 EndTime={end} Partition=main"
)
LATER, LIMIT = "2026-11-21T13:09:46", "2026-11-21T13:10:43"  # three seconds on, and a minute


@pytest.mark.parametrize(
    ("state", "restarts", "limit", "end", "why"),
    [
        ("COMPLETING", 0, "365-00:00:00", LATER, "cancelled"),
        ("CANCELLED", 0, "UNLIMITED", LATER, "cancelled"),
        ("COMPLETING", 1, "UNLIMITED", "Unknown", "requeued"),
        ("COMPLETING", 0, "00:01:00", LIMIT, "out of time"),
        ("COMPLETING", 0, "1-00:01:00", LIMIT, "cancelled"),
        ("TIMEOUT", 0, "00:01:00", LIMIT, "out of time"),
        ("PREEMPTED", 0, "00:01:00", LATER, "preempted"),
        ("RUNNING", 0, "00:01:00", LIMIT, None),  # kill, or scancel --signal=TERM
    ],
)
def test_why_slurm_ends_a_job(
    answer: Callable[..., list[tuple[str, ...]]],
    state: str,
    restarts: int,
    limit: str,
    end: str,
    why: str | None,
) -> None:
    called = answer(SHOWN.format(state=state, restarts=restarts, limit=limit, end=end))

    assert why_ended("7", restarts=0) == why
    assert called == [("scontrol", "show", "job", "--oneliner", "7")]


def test_restarted_job_can_be_cancelled_too(
    answer: Callable[..., list[tuple[str, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(SHOWN.format(state="COMPLETING", restarts=2, limit="UNLIMITED", end=LATER))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")

    told = reason(Preempted(signal.SIGTERM), "9_1")
    assert (
        told == "cancelled: SLURM ended job 9_1; clpeft submit, or clpeft resume, continues the run"
    )
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert reason(Preempted(signal.SIGTERM), "9_1") == (
        "SLURM requeued job 9_1, which continues the run"
    )


def test_reason_is_the_runs_own_where_slurm_has_no_part(
    answer: Callable[..., list[tuple[str, ...]]],
) -> None:
    called = answer(SHOWN)

    assert reason(Preempted(signal.SIGTERM), None) is None  # not in a job
    assert reason(Preempted(signal.SIGINT), "9_1") is None
    assert reason(KeyboardInterrupt(), "9_1") is None
    assert called == []
    answer(ConfigError("scontrol gave no answer in 60 seconds."))
    assert reason(Preempted(signal.SIGTERM), "9_1") is None


@pytest.mark.usefixtures("term_as_before")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_job_is_requeued_after_a_signal_that_asks_for_it(
    answer: Callable[..., list[tuple[str, ...]]], number: int
) -> None:
    called = answer("")
    requeue_if_asked(Preempted(number), "9_1")

    assert called == [("scontrol", "requeue", "9_1")]
    # with which SLURM ends what is left of the job
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("number", "job"),
    [(signal.SIGTERM, "9_1"), (signal.SIGINT, "9_1"), (signal.SIGUSR1, None)],
)
def test_job_is_not_requeued_otherwise(
    answer: Callable[..., list[tuple[str, ...]]], number: int, job: str | None
) -> None:
    called = answer("")
    requeue_if_asked(Preempted(number), job)

    assert called == []


@pytest.mark.usefixtures("term_as_before")
def test_requeue_that_is_refused_is_told(
    answer: Callable[..., list[tuple[str, ...]]], caplog: pytest.LogCaptureFixture
) -> None:
    answer(ConfigError("scontrol requeue 9_1 failed: Requested operation is presently disabled."))
    requeue_if_asked(Preempted(signal.SIGUSR1), "9_1")

    assert "presently disabled. The same command, or clpeft resume, continues" in caplog.text
