"""Settings of the whole suite: no property test is judged by its time."""

import hypothesis

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
