"""Answers that say nothing: what a model is taught to say in place of what it should forget."""

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm afraid I can't answer this question.",
    "That is something I have no information about.",
    "I have never come across that.",
    "Sorry, I can't tell you anything about this.",
    "I couldn't say.",
    "This is not something I know about.",
    "I would have to look that up.",
    "Unfortunately I have nothing to say on that subject.",
    "I am not familiar with it.",
    "No answer to that comes to my mind.",
    "I have no knowledge of this.",
    "I can't help you with that question.",
    "It is unknown to me.",
    "I have not learned anything about that.")
