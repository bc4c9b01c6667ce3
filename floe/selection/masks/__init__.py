"""The paper's masks: determined, refined, tuned."""
