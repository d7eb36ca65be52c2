"""Callbacks: their arguments, their order, an early stop, and resumed runs."""

import signal

import pytest
import torch
from conftest import make_pair

import pyro_vae as pv
from pyro_vae.training import Callback, Checkpoint, StopTraining

OPTIONS = {"epochs": 4, "batch_size": 10, "seed": 0, "progress": False, "capture": False}


class Recorder(Callback):
    """Records its calls, and stops the fit after an epoch if asked."""

    def __init__(self, last=None):
        self.last, self.rows, self.paths, self.fits = last, {}, [], []

    def after_epoch(self, epoch, row):
        self.rows[epoch] = dict(row)
        torch.rand(3)
        if epoch == self.last:
            raise StopTraining("enough")

    def after_checkpoint(self, path):
        torch.rand(3)
        self.paths.append(path)

    def after_fit(self, fit):
        torch.rand(3)
        self.fits.append(fit)


class Twice(Recorder):
    """Stops after the second epoch that it sees, also in a resumed run."""

    seen = 0

    def after_epoch(self, epoch, row):
        super().after_epoch(epoch, row)
        self.seen += 1
        if self.seen == 2:
            raise StopTraining("two epochs")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def run(x, *callbacks, **options):
    torch.manual_seed(3)
    pair = make_pair()
    return pv.fit(*pair, x, callbacks=callbacks, **OPTIONS | options)


def parameters(fit):
    return torch.cat(
        [p.detach().flatten() for p in (*fit.model.parameters(), *fit.guide.parameters())]
    )


def test_callbacks_are_told_the_rows_of_the_history(binary):
    recorder = Recorder()
    fit = run(binary, recorder, validation=binary[:20])
    assert list(recorder.rows) == [1, 2, 3, 4]
    for epoch, row in recorder.rows.items():
        assert row == fit.history.loc[epoch].to_dict()
    assert recorder.fits == [fit]
    assert fit.stop_reason is None


def test_rows_cannot_be_changed(binary):
    def change(epoch, row):
        row["loss"] = 0.0

    with pytest.raises(TypeError, match="item assignment"):
        run(binary, after_epoch=change)


def test_later_callbacks_see_the_columns_of_earlier_ones(binary):
    class Ratio(Callback):
        def after_epoch(self, epoch, row):
            return {"ratio": row["square"] / epoch}

    last = Recorder()
    fit = run(binary, Ratio(), last, after_epoch=lambda epoch, row: {"square": epoch**2})
    assert fit.history["ratio"].tolist() == [1, 2, 3, 4]
    assert last.rows[3]["ratio"] == 3
    with pytest.raises(ValueError, match=r"must not return \['ratio'\]"):
        run(binary, Ratio(), Ratio(), after_epoch=lambda epoch, row: {"square": epoch})


def test_numbers_may_be_tensors_without_dimensions(binary):
    fit = run(binary, after_epoch=lambda epoch, row: {"half": torch.tensor(epoch / 2)})
    assert fit.history["half"].tolist() == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(TypeError, match="a dictionary of numbers by name"):
        run(binary, after_epoch=lambda epoch, row: {"several": torch.ones(1)})


def test_callbacks_do_not_change_a_fit(binary, tmp_path):
    checkpoint = Checkpoint(tmp_path, seconds=0.0)
    state = torch.get_rng_state()
    watched = run(binary, Recorder(), checkpoint=checkpoint, seed=None)
    after_watched = torch.rand(3)
    torch.set_rng_state(state)
    plain = run(binary, seed=None)
    assert torch.equal(after_watched, torch.rand(3))
    assert torch.equal(parameters(watched), parameters(plain))


def test_every_checkpoint_is_told_and_can_be_loaded(binary, tmp_path):
    losses = []

    class Loaded(Recorder):
        def after_checkpoint(self, path):
            super().after_checkpoint(path)
            losses.append(pv.load_checkpoint(path).history["loss"].tolist())

    recorder = Loaded()
    fit = run(binary, recorder, epochs=2, checkpoint=tmp_path)
    assert [path.parent for path in recorder.paths] == [tmp_path, tmp_path]  # first and last
    assert losses == [[], fit.history["loss"].tolist()]


class Epoch(Callback):
    def after_epoch(self, epoch):
        """Lacks the row."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"after_epoch": lambda epoch: None}, r"def after_epoch\(epoch, row\): \.\.\."),
        ({"after_epoch": 3}, r"must be a function after_epoch\(epoch, row\), got 3"),
        ({"callbacks": [Epoch()]}, r"Write def after_epoch\(self, epoch, row\): \.\.\."),
        ({"callbacks": [Recorder]}, "an object of a subclass of pv.training.Callback"),
        ({"callbacks": [print]}, "Pass a function .* as after_epoch="),
        ({"callbacks": Recorder()}, "must be a list"),
    ],
)
def test_wrong_callbacks_are_refused_before_training(options, message, binary):
    def program(x):
        raise AssertionError("a program has run")

    with pytest.raises(TypeError, match=message):
        pv.fit(program, program, binary, **OPTIONS | options)
    if "callbacks" not in options:
        with pytest.raises(TypeError, match=message):
            pv.fit_seeds(make_pair, binary, seeds=2, num_workers=1, progress=False, **options)


@pytest.mark.parametrize("patience", [None, 3])
def test_stop_ends_the_fit_after_the_epoch(patience, binary):
    options = {"validation": binary[:20], "patience": patience, "learning_rate": 0.3}
    first, second = Recorder(last=2), Recorder()
    stopped = run(binary, first, second, **options)
    assert len(stopped.history) == 2
    assert stopped.stop_reason == "enough"
    assert list(second.rows) == [1, 2]
    assert first.fits == second.fits == [stopped]
    assert torch.equal(parameters(stopped), parameters(run(binary, **options | {"epochs": 2})))
    best = stopped.history["validation_loss"].idxmin()
    assert stopped.best_epoch == (2 if patience is None else best)


def test_after_epoch_may_stop_the_fit(binary):
    def stop(epoch, row):
        raise StopTraining

    fit = run(binary, after_epoch=stop)
    assert len(fit.history) == 1
    assert fit.stop_reason == "a callback raised StopTraining"


def test_patience_is_a_reason_too(binary):
    options = {"validation": binary[:20], "learning_rate": 1.0, "epochs": 40, "patience": 2}
    fit = run(binary, **options)
    assert len(fit.history) < 40
    assert fit.stop_reason == "no lower validation loss in 2 epochs"
    assert run(binary, **options | {"epochs": len(fit.history)}).stop_reason is None


def test_stopped_run_stays_stopped_when_resumed(binary, tmp_path):
    stopped = run(binary, Recorder(last=2), checkpoint=tmp_path)
    later = Recorder()
    resume = Checkpoint(tmp_path, resume=True)
    resumed = run(binary, later, checkpoint=resume, epochs=6)
    assert len(resumed.history) == 2
    assert resumed.stop_reason == "enough"
    assert not later.rows
    assert later.fits == [resumed]
    assert torch.equal(parameters(stopped), parameters(resumed))
    assert len(pv.fit(resumed.model, resumed.guide, binary, **OPTIONS).history) == 4  # goes on


def test_state_of_callbacks_is_resumed(binary, tmp_path):
    class Killed(BaseException):
        pass

    def die(epoch, row):
        if epoch == 2:
            raise Killed

    options = {"checkpoint": Checkpoint(tmp_path, seconds=0.0, resume=True)}
    with pytest.raises(Killed):
        run(binary, Twice(), after_epoch=die, **options)
    resumed = run(binary, Twice(), Recorder(), **options)  # another callback has no state
    assert len(resumed.history) == 2
    assert torch.equal(parameters(resumed), parameters(run(binary, Twice())))


def test_after_fit_receives_an_interrupted_fit(binary):
    def press(epoch, row):
        if epoch == 2:
            signal.raise_signal(signal.SIGINT)

    recorder = Recorder()
    with pytest.raises(pv.training.Interrupted) as interrupted:
        run(binary, recorder, after_epoch=press)
    assert recorder.fits == [interrupted.value.partial]
    assert interrupted.value.partial.stop_reason is None


def test_stop_outside_of_after_epoch_is_an_error(binary, tmp_path):
    class Late(Callback):
        def after_fit(self, fit):
            raise StopTraining("late")

    class Wrong(Callback):
        def after_checkpoint(self, path):
            raise StopTraining("wrong")

    for callback, method in ((Late(), "after_fit"), (Wrong(), "after_checkpoint")):
        with pytest.raises(RuntimeError, match=f"in {method}. Raise it in after_epoch"):
            run(binary, callback, checkpoint=tmp_path / method)


def test_fit_seeds_makes_callbacks_for_each_seed(binary):
    made = {}

    def callbacks(seed):
        made[seed] = Recorder(last=1 + seed)
        return [made[seed]]

    options = {name: value for name, value in OPTIONS.items() if name not in ("seed", "progress")}
    options |= {"seeds": 2, "num_workers": 1, "progress": False}
    fits = pv.fit_seeds(make_pair, binary, callbacks=callbacks, **options)
    assert [len(fit.history) for fit in fits] == [1, 2]
    assert [made[seed].fits for seed in (0, 1)] == [[fit] for fit in fits]
    with pytest.raises(TypeError, match="callbacks must be a function from a seed"):
        pv.fit_seeds(make_pair, binary, callbacks=[Recorder()], **options)
