# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---


# %% [markdown]
# # 3. Long text, generated locally
#
# From a plan of the memory to text past the trained length. You will see what a context takes, a prompt being read in
# chunks, what keys and values in 8 and 4 bits cost, and a second question on the same text that is answered at once.
#
# The cells use the tiny LLaMA of the package, stretched from 512 to 4096 tokens. For a checkpoint of your own, put its
# folder or its Hugging Face id here.

# %%
import logging
from importlib.resources import files

logging.getLogger("mlx_resonance").setLevel(logging.ERROR)  # no line about a missing GPU
CHECKPOINT = str(files("mlx_resonance") / "assets/stdlib-llama")  # or such as "meta-llama/Llama-2-7b-hf"

# %%
import tempfile
from pathlib import Path

from mlx_resonance import load
from mlx_resonance.convert import convert

work = Path(tempfile.mkdtemp())
folder = work / "8x"
convert(CHECKPOINT, folder, rope="yarn", factor=8, dtype="float32")  # float32 is the fast type of a CPU
model, tokenizer = load(folder)

# %% [markdown]
# ## Does it fit?
#
# `plan_memory` reads no weights. It counts them, the keys and values of the context, and what reading the prompt takes
# besides; `generate` refuses what does not fit before it starts.

# %%
from mlx_resonance import plan_memory

contexts = [512, 1024, 2048, 4096]
plans = {bits: [plan_memory(folder, context, kv_bits=bits) for context in contexts] for bits in (None, 8, 4)}
names = {None: "as the model's", 8: "8 bit", 4: "4 bit"}

# %%
from mlx_resonance.notebook_figures import lines

curves = {f"keys and values {names[bits]}": [plan.total / 1e6 for plan in plans[bits]] for bits in plans}
lines(contexts, curves, "context, tokens", "memory, MB")

# %%
sizes = {bits: plans[bits][-1].kv for bits in plans}
assert sizes[4] < sizes[8] < sizes[None]
assert plans[None][-1].kv == contexts[-1] * plans[None][-1].kv_per_token

# %% [markdown]
# ## Reading and writing past the trained length
#
# The prompt is the beginning of a module of the standard library that the tiny model was not trained on, three times as
# long as its training sequences. The figure grows while the prompt is read: a prompt is read in chunks.

# %%
import sysconfig

text = (Path(sysconfig.get_paths()["stdlib"]) / "http/server.py").read_text()
prompt = tokenizer.encode(text)[:1536]
trained = 512
assert len(prompt) == 3 * trained

# %%
import time

from mlx_resonance import stream_generate

from IPython.display import display

start, done, seconds = time.perf_counter(), [0], [0.0]
handle = display(lines(seconds, {"read": done}, "seconds", "tokens"), display_id=True)


def progress(count, total):
    done.append(count)
    seconds.append(time.perf_counter() - start)
    handle.update(lines(seconds, {f"read of {total}": done}, "seconds", "tokens"))


options = {"max_tokens": 120, "temp": 0.6, "seed": 1, "prefill_step_size": 256}
pieces = [response.text for response in stream_generate(model, tokenizer, prompt, progress=progress, **options)]

# %%
assert done[-1] == len(prompt) and len(done) > 5
written = "".join(pieces)
print(tokenizer.decode(prompt[-40:]) + "▶" + written)

# %% [markdown]
# The model is tiny: it writes what looks like Python and knows nothing. What matters here is that it goes on doing so
# past 512 tokens. The same seed gives the same text.

# %%
again = "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))
assert again == written
assert sum(character.isalnum() for character in written) > 0.2 * len(written)

# %% [markdown]
# ## Keys and values in 8 and 4 bits
#
# How much worse are the predictions? The perplexity of the module's first 2048 tokens with each format, and the bytes.

# %%
from mlx_resonance.evaluation.losses import score

import numpy as np

tokens = np.array(tokenizer.encode(text)[:2048], np.int32)[None]
perplexity = {names[bits]: float(np.exp(score(model, tokens, 2047, kv_bits=bits).mean())) for bits in plans}
megabytes = {names[bits]: plans[bits][2].kv / 1e6 for bits in plans}

# %%
from mlx_resonance.notebook_figures import bars

display(bars(megabytes, "keys and values of 2048 tokens, MB"), bars(perplexity, "perplexity"))

# %%
plain = perplexity[names[None]]
assert abs(perplexity["8 bit"] / plain - 1) < 0.01
assert abs(perplexity["4 bit"] / plain - 1) < 0.10
assert megabytes["4 bit"] < 0.2 * megabytes[names[None]]

# %% [markdown]
# ## The second question
#
# With a prompt cache, keys and values of a prompt stay on the disk, filed by the model, its angles and the tokens. The
# next prompt that begins alike is read from where it differs.

# %%
from mlx_resonance.generation.prompt_cache import PromptCache, cache_key

cache = PromptCache(work / "prompts", cache_key(folder, model.args.rope, None))
question = tokenizer.encode("\n    def do_", add_special_tokens=False)


def first_token(tokens):
    start = time.perf_counter()
    next(stream_generate(model, tokenizer, tokens, max_tokens=1, prompt_cache=cache))
    return time.perf_counter() - start


# %%
cold = first_token(prompt)
warm = first_token(prompt + question)
bars({"the text": cold, "the text and a question": warm}, "seconds to the first token")

# %%
from mlx_resonance.generation.cache import make_cache

known = cache.fetch(prompt + question, make_cache(model, 4096, None))
assert known >= len(prompt) - 1  # only what is new has to be read
print(f"{known} of {len(prompt + question)} tokens are known; {cold:.2f} s, then {warm:.2f} s")

# %% [markdown]
# Next: [PosGen](04-posgen.ipynb), the paper's benchmark.
