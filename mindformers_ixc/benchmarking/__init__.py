"""Public benchmarks as IXC2.5 was measured on them: VLMEvalKit's tables, the published prompts and limits, its scores.

What VLMEvalKit does is described here by behaviour, of release 0.0.20 (`ms-vlmeval` on PyPI): its adapter for this
model (`vlmeval/vlm/xcomposer/xcomposer2d5.py`) says how is asked, its data sets say how is scored. Nothing in this
package needs it, pandas or a framework. `scripts/vlmeval_check.py` compares both, in an environment that has it.
"""
