"""Which trainings a study makes, for tests of what it keeps."""

from analysis import trainings


def trained(monkeypatch) -> list:
    """The configurations of the trainings from now on."""
    made, train = [], trainings.train

    def listed(model, config, *rest):
        made.append(config)
        return train(model, config, *rest)

    monkeypatch.setattr(trainings, "train", listed)
    return made
