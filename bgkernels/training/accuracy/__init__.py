"""Which way to distil makes students right: many methods on a task whose answers are checked.

In the order in which a reader may want them: :mod:`~bgkernels.training.accuracy.config`,
:mod:`~bgkernels.training.accuracy.school` (a student's lesson),
:mod:`~bgkernels.training.accuracy.rows` (what is measured of it),
:mod:`~bgkernels.training.accuracy.run`, :mod:`~bgkernels.training.accuracy.claims`.
"""
