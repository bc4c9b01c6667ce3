"""A run: configuration in, report out. One module a command, and ``run`` over all of them.

A command's module has ``stages``, which lists the folders that it fills, ``inputs``, what decides
their content, and ``build``, which makes it. They share what ``inputs.RunInputs`` opens, and
``run_folder`` keeps what they make.

Nothing is imported here: ``run_folder`` needs no torch, the commands need all of it.
"""
