# %% [markdown]
# # LLMEmb in ten lines
# Open this file as a notebook (VS Code, or `jupytext --to ipynb docs/ten_lines.py`), or run it. Put your own frames in the first
# cell: `items` with `item_id` and attributes, `events` with `user_id`, `item_id` and `timestamp`. To serve: docs/own-tables.md.

# %%
import pandas as pd

from jobs.frames import recommend_from_frames

KINDS = ["espresso cups", "running shoes", "garden tools", "board games"]
items = pd.DataFrame({"item_id": range(80), "title": [f"{KINDS[n % 4]}, model {n}" for n in range(80)]})
# each user takes items of one kind; items 72 to 79 are new: no event names them
events = pd.DataFrame(
    [(user, 4 * ((7 * user + step) % 18) + user % 4, f"2026-01-{step + 1:02d}") for user in range(60) for step in range(12)],
    columns=["user_id", "item_id", "timestamp"],
)

# %%
answer = recommend_from_frames(items, events, k=5, settings={"pretrain.training.epochs": 8, "rat.training.epochs": 8})

# %%
answer.recommendations.head(10)

# %%
answer.metrics.query("metric == 'ndcg@10'").pivot(index="model", columns="slice", values="value").round(4)

# %%
answer.embeddings.head()
