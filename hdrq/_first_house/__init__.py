"""Module names of the first house that users import, for one release: each warns, and gives what is elsewhere now.

The folder is on the path of the package, so ``hdrq.model`` is ``hdrq/_first_house/model.py``.
"""
