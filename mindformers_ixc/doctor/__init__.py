"""What `mindformers doctor` looks at: versions, the machine, Ascend's own files, and a model that trains and answers.

Everything but `self_test`, which runs in a process of its own, leaves MindSpore unimported, so that it answers at once
and where MindSpore cannot be imported at all.
"""
