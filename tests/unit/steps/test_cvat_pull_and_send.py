"""What reviewers accept in CVAT is entered and offered; frames that need a human go to people as jobs of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
for folder in (PROJECT, PROJECT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from doubles.cvat import CvatDouble, cvat  # noqa: E402
from doubles.cvat_work import accept, run, workbench_on  # noqa: E402
from workbench import kinds  # noqa: E402
from workbench.annotation import Annotation  # noqa: E402
from workbench.errors import Invalid, NotFound, Unavailable  # noqa: E402
from workbench.ports import Quiet  # noqa: E402
from workbench.run import settle  # noqa: E402
from workbench.steps.cvat_pull import Pulled, look, offer, pull  # noqa: E402
from workbench.steps.cvat_review import choose, measured, send  # noqa: E402
from workbench.steps.version import version  # noqa: E402
from workbench.wiring import Workbench  # noqa: E402

NAMES = [f"{number:03}.jpg" for number in range(6)]


@pytest.fixture
def double() -> Iterator[CvatDouble]:
    with cvat() as served:
        served.state.users[3] = "worker2"
        yield served


@pytest.fixture
def workbench(double: CvatDouble, tmp_path: Path) -> Workbench:
    made = workbench_on(double, tmp_path / "home")
    # The sureness falls from frame to frame; on 002 and 004 the second model finds something else.
    run(made, "r1", "student@1", {name: [(10.0, 0.9 - number / 10)] for number, name in enumerate(NAMES)})
    return made


def pulled(workbench: Workbench, **more: object) -> Pulled:
    return pull("cells", server=workbench.cvat, store=workbench.datasets, records=workbench.records,
                hooks=workbench.hooks, job=Quiet(), person="ada", gather_s=0, **more)


def sent(workbench: Workbench, job_id: str = "job1", **more: object):
    return send("cells", server=workbench.cvat, models=workbench.models, blobs=workbench.blobs, records=workbench.records,
                open_backend=workbench.open_backend, certificates=workbench.certificates, job=Quiet(job_id), person="ada",
                **more)


def jobs(workbench: Workbench, task: int | None = None) -> list:
    return [one for one in workbench.cvat.people("cells").jobs() if task in (None, one.task_id)]


def standing(workbench: Workbench) -> dict[str, list]:
    return {name: [(a.id, a.label, a.xyxy, a.source, a.confidence) for a in working.annotations or ()]
            for name, working in workbench.cvat.read("cells", NAMES).items()}


def drawings(double: CvatDouble) -> int:
    return sum(len(stored["shapes"]) for stored in double.state.records.values())


# Pull


def test_an_accepted_job_s_frames_are_entered_once_and_the_next_version_is_offered(workbench: Workbench) -> None:
    first = jobs(workbench)[0]
    accept(workbench, first.id)
    one = pulled(workbench)
    assert (one.jobs, one.frames, one.decisions, one.next, one.published) == ((first.id,), 2, 2, "0.2.0", "")
    assert [(entry.subject, entry.person, entry.facts["in"]) for entry in workbench.records.entries("reviews", "cells")] == [
        (name, "worker1", f"CVAT job {first.id}") for name in reversed(NAMES[:2])]
    assert pulled(workbench).decisions == 0  # again: nothing is doubled
    entry = offer("cells", store=workbench.datasets, records=workbench.records)
    assert (entry.facts["next"], entry.facts["frames_changed"], entry.facts["jobs"]) == ("0.2.0", 2, [first.id])
    assert [made.version for made in workbench.datasets.versions("cells")] == ["0.1.0"]  # not by itself
    made = version("cells", server=workbench.cvat, store=workbench.datasets, job=Quiet(), person="ada", message="x")
    assert (made.version, made.labeled) == ("0.2.0", 2)
    assert offer("cells", store=workbench.datasets, records=workbench.records) is None
    assert pulled(workbench).next == ""


def test_a_setting_publishes_at_once(workbench: Workbench) -> None:
    accept(workbench, jobs(workbench)[0].id)
    assert pulled(workbench, publish="publish").published == "cells@0.2.0"
    assert workbench.datasets.versions("cells")[0].labeled == 2
    assert offer("cells", store=workbench.datasets, records=workbench.records) is None
    with pytest.raises(Invalid, match="cvat_publish must be ask or publish, is 'now'"):
        pulled(workbench, publish="now")


def test_a_reopened_job_takes_its_offer_back_and_accepting_it_again_makes_one(workbench: Workbench) -> None:
    first = jobs(workbench)[0]
    accept(workbench, first.id)
    pulled(workbench)
    workbench.cvat.people("cells").set_job(first.id, state="in progress")
    assert pulled(workbench).next == ""
    assert offer("cells", store=workbench.datasets, records=workbench.records) is None
    accept(workbench, first.id)
    assert (pulled(workbench).next, len(workbench.records.entries("reviews", "cells"))) == ("0.2.0", 2)


def test_a_pull_says_how_far_the_model_agrees_with_the_reviewers(workbench: Workbench, double: CvatDouble) -> None:
    first = jobs(workbench)[0]
    stored = double.state.records[first.id]["shapes"]
    stored[0]["points"] = [200, 100, 300, 200]  # moved far away: one box more and one less
    accept(workbench, first.id)
    assert pulled(workbench).agreement == {"frames": 2, "both": 1, "only_first": 1, "only_second": 1, "mislabelled": 0, "precision": 0.5,
                                           "recall": 0.5, "accuracy": 0.3333}
    assert measured("cells", server=workbench.cvat).accuracy == 0.3333


def test_a_task_that_was_deleted_meanwhile_ends_in_a_sentence_and_no_endless_repetition(
        workbench: Workbench, double: CvatDouble) -> None:
    accept(workbench, *[one.id for one in jobs(workbench)])
    double.state.delete_task(jobs(workbench)[0].task_id)
    report = pulled(workbench)
    assert (report.jobs, report.frames, report.next) == ((), 0, "")
    asked: list[str] = []
    assert look("cells", server=workbench.cvat, hooks=workbench.hooks, submit=lambda *one: asked.append(one)) is None
    double.state.delete_project(workbench.cvat.project("cells"))
    with pytest.raises(NotFound, match="deleted in CVAT.*Upload the data set again"):
        pulled(workbench)
    assert look("cells", server=workbench.cvat, hooks=workbench.hooks, submit=lambda *one: asked.append(one)) is None
    assert asked == [] and workbench.datasets.versions("cells")[0].version == "0.1.0"


def test_a_server_that_does_not_answer_is_asked_again_by_the_next_look(workbench: Workbench, double: CvatDouble) -> None:
    accept(workbench, jobs(workbench)[0].id)
    double.fail("GET", "/annotations", 500, times=50)
    with pytest.raises(Unavailable):
        pulled(workbench)
    double.faults.clear()
    asked: list[tuple[str, ...]] = []
    look("cells", server=workbench.cvat, hooks=workbench.hooks, submit=lambda *one: asked.append(one))
    assert len(asked) == 1 and pulled(workbench).frames == 2


# Choosing


def test_frames_are_chosen_by_the_least_confidence_the_most_disagreement_and_by_chance(workbench: Workbench) -> None:
    run(workbench, "r2", "teacher@1", {
        "000.jpg": [(10.0, 0.9)], "001.jpg": [(10.0, 0.9)], "002.jpg": [(200.0, 0.9)], "003.jpg": [(10.0, 0.9)],
        "004.jpg": [(10.0, 0.9), (200.0, 0.9)], "005.jpg": [(10.0, 0.4)]})
    chosen = choose("cells", low_confidence=1, disagreement=3, random=2, seed=1, server=workbench.cvat)
    assert [(one.name, one.why, one.score) for one in chosen[:3]] == [
        ("005.jpg", "low confidence", 0.4), ("002.jpg", "disagreement", 1.0), ("004.jpg", "disagreement", 0.3333)]
    assert [one.why for one in chosen[3:]] == ["random", "random"] and len({one.name for one in chosen}) == 5
    assert choose("cells", random=2, seed=1, server=workbench.cvat) == choose("cells", random=2, seed=1, server=workbench.cvat)
    assert choose("cells", low_confidence=1, server=workbench.cvat, leave_out=["005.jpg"])[0].name != "005.jpg"
    others = {name: (Annotation("RBC", xyxy=(10, 20, 60, 70)),) for name in NAMES}
    assert [one.name for one in choose("cells", disagreement=6, others=others, server=workbench.cvat)] == ["002.jpg", "004.jpg"]


# Sending


def test_chosen_frames_become_jobs_of_the_chosen_size_for_the_chosen_people(workbench: Workbench, double: CvatDouble) -> None:
    before, count = standing(workbench), drawings(double)
    old = jobs(workbench)
    report = sent(workbench, low_confidence=3, people=["worker1", "worker2"], job_size=2)
    assert (report.frames, report.chosen, report.skipped) == (3, {"low confidence": 3}, {})
    new = jobs(workbench, report.task)
    assert [(one.frames, one.assignee, one.stage, one.state) for one in new] == [
        (2, "worker1", "annotation", "new"), (1, "worker2", "annotation", "new")]
    assert {one.id: one.assignee for one in new} == report.jobs
    assert standing(workbench) == before and drawings(double) == count  # the drawings went along, none is doubled
    where = workbench.cvat.jobs_of("cells")
    assert [where[name] for name in ("005.jpg", "004.jpg", "003.jpg")] == [new[0].id, new[0].id, new[1].id]
    assert {where[name] for name in NAMES[:3]} <= {one.id for one in old}
    assert double.state.tasks[old[0].task_id]["deleted_frames"] == [3, 4, 5]  # hidden where they lay
    accept(workbench, new[0].id)
    assert sorted(workbench.cvat.frame_names("cells", "accepted")) == ["004.jpg", "005.jpg"]
    assert sent(workbench, "job2", low_confidence=3).chosen == {"low confidence": 3}  # the rest, without those accepted


def test_sending_again_after_a_kill_anywhere_ends_the_same(double: CvatDouble, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    for nth in range(1, 60):
        double.before = lambda method, path: None
        made = workbench_on(double, tmp_path / f"home{nth}")
        run(made, "r1", "student@1", {name: [(10.0, 0.9 - number / 10)] for number, name in enumerate(NAMES)})
        before, count, left = standing(made), drawings(double), [nth]
        call = made.cvat.connection.call

        def dying(method: str, path: str, *more: object, **named: object) -> object:
            if method != "GET":
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
            return call(method, path, *more, **named)

        made.cvat.connection.call = dying
        try:
            sent(made, low_confidence=3, people=["worker1"], job_size=2)
            is_through = True
        except Killed:
            is_through = False
        made.cvat.connection.call = call
        report = sent(made, low_confidence=3, people=["worker1"], job_size=2)
        assert standing(made) == before and drawings(double) == count, f"killed at request {nth}"
        assert [(one.frames, one.assignee) for one in jobs(made, report.task)] == [(2, "worker1"), (1, "worker1")]
        assert len({one.task_id for one in jobs(made)}) == 2
        assert double.state.tasks[min(one.task_id for one in jobs(made))]["deleted_frames"] == [3, 4, 5]
        made.cvat.delete_task("cells")
        if is_through:
            break
    assert is_through and nth > 8


def test_what_a_person_began_or_drew_stays_where_it_is(workbench: Workbench, double: CvatDouble) -> None:
    first, second, third = jobs(workbench)
    workbench.cvat.people("cells").set_job(first.id, state="in progress", assignee="worker1")
    label = next(iter(double.state.labels))
    double.state.write([second.id], {"shapes": [{"type": "points", "label_id": label, "frame": 2, "points": [1, 1]}]}, "create")
    double.state.write([third.id], {"shapes": [{"type": "rectangle", "label_id": label, "frame": 5, "source": "manual",
                                                "points": [100, 100, 150, 150]}]}, "create")
    report = sent(workbench, random=6)
    assert report.frames == 3 and set(report.skipped) == {"000.jpg", "001.jpg", "002.jpg"}
    assert report.skipped["000.jpg"] == f"its job {first.id} is in progress in stage annotation (worker1)"
    assert "points" in report.skipped["002.jpg"]
    moved = workbench.cvat.read("cells", ["005.jpg"])["005.jpg"]
    assert sorted(a.source for a in settle(moved, "worker2")) == ["human:worker2", "model:student@1"]  # hers went along
    assert [s["type"] for s in double.state.records[second.id]["shapes"] if s["frame"] == 2] == ["rectangle", "points"]


def test_frames_that_were_sent_or_assigned_are_not_sent_again(workbench: Workbench) -> None:
    assert sent(workbench, low_confidence=2).frames == 2
    workbench.cvat.people("cells").set_job(jobs(workbench)[0].id, assignee="worker1")
    report = sent(workbench, "job2", random=6)
    assert report.frames == 2 and set(report.skipped) == {"000.jpg", "001.jpg", "004.jpg", "005.jpg"}
    assert "is assigned to worker1" in report.skipped["000.jpg"] and "sent already" in report.skipped["005.jpg"]


def test_a_job_that_somebody_begins_while_the_pictures_are_sent_keeps_its_frames(
        workbench: Workbench, double: CvatDouble) -> None:
    third = jobs(workbench)[2]

    def begin(method: str, path: str) -> None:
        if method == "POST" and path.endswith("/data/"):
            double.state.jobs[third.id]["state"] = "in progress"

    double.before = begin
    report = sent(workbench, low_confidence=3)
    assert report.frames == 1 and set(report.skipped) == {"004.jpg", "005.jpg"}
    assert workbench.cvat.jobs_of("cells")["005.jpg"] == third.id


def test_honeypots_are_accepted_frames_mixed_unmarked_into_every_job(workbench: Workbench, double: CvatDouble) -> None:
    accept(workbench, jobs(workbench)[0].id)
    before = standing(workbench)
    report = sent(workbench, low_confidence=4, job_size=2, truth="honeypots", truth_frames=2, people=["worker1"])
    new = jobs(workbench, report.task)
    plain = [one for one in new if one.type == "annotation"]
    assert [one.frames for one in plain] == [3, 3] and report.truth_job == next(o.id for o in new if o.type == "ground_truth")
    assert next(one for one in new if one.type == "ground_truth").is_accepted
    assert standing(workbench) == before  # of the data set's frames nothing is doubled
    where = workbench.cvat.jobs_of("cells")
    assert {where[name] for name in NAMES[2:]} == {one.id for one in plain}
    assert {where[name] for name in NAMES[:2]} == {jobs(workbench)[0].id}  # the accepted ones did not move
    drawn = [{shape["frame"] for shape in double.state.records[one.id]["shapes"]} for one in plain]
    assert [len(frames) for frames in drawn] == [3, 3]  # a honeypot looks like its neighbours
    quality = workbench.cvat.people("cells").measure_quality(report.task)
    assert quality.frames == 2
    accept(workbench, plain[0].id)
    assert len(workbench.cvat.frame_names("cells", "accepted")) == 4


def test_a_ground_truth_job_over_some_of_the_frames_is_made_by_choice(workbench: Workbench) -> None:
    report = sent(workbench, low_confidence=4, truth="ground_truth", truth_frames=2)
    truth, = [one for one in jobs(workbench, report.task) if one.type == "ground_truth"]
    assert (truth.id, truth.frames, truth.stage) == (report.truth_job, 2, "annotation")
    assert sent(workbench, low_confidence=4, truth="ground_truth", truth_frames=2).truth_job == truth.id


@pytest.mark.parametrize("asked, says", [
    ({}, "At least one must be above 0"), ({"random": -1}, "random"), ({"low_confidence": 1, "truth": "maybe"}, "truth must be"),
    ({"low_confidence": 1, "job_size": 0}, "job_size must be 1 to 1000"),
    ({"low_confidence": 1, "people": ["nobody"]}, "shows no user 'nobody'"),
    ({"low_confidence": 1, "truth": "honeypots"}, "5 honeypots need as many accepted frames of cells; there are 0"),
    ({"random": 1, "disagreement": 1, "model": "ghost@1"}, "ghost@1")])
def test_what_cannot_be_sent_is_said_before_anything_is_made(workbench: Workbench, double: CvatDouble, asked: dict, says: str) -> None:
    before = len(double.state.tasks)
    with pytest.raises((Invalid, NotFound), match=says):
        sent(workbench, **asked)
    assert len(double.state.tasks) == before and workbench.records.entries("cvat_reviews") == []


def test_nothing_left_to_send_says_why(workbench: Workbench) -> None:
    for one in jobs(workbench):
        workbench.cvat.people("cells").set_job(one.id, state="in progress")
    with pytest.raises(NotFound, match="6 wait in jobs that somebody has"):
        sent(workbench, random=3)


def test_pull_and_send_are_job_kinds(workbench: Workbench) -> None:
    accept(workbench, jobs(workbench)[0].id)
    steps = kinds.all_of(workbench)
    assert steps["pull"]({"dataset": "cells"}, Quiet("p"))["next"] == "0.2.0"
    report = steps["send"]({"dataset": "cells", "low_confidence": 2, "people": ["worker1"]}, Quiet("s"))
    assert report["frames"] == 2 and list(report["jobs"].values()) == ["worker1"]
    with pytest.raises(Invalid, match="colour is none of them"):
        steps["send"]({"dataset": "cells", "colour": "red"}, Quiet("s"))
