"""What a text is about: its words without those that every text has."""

from relearn_jax.cases.spelling import words

FUNCTION_WORDS = frozenset("""
a about above after again against all also am an and any are as at be because been before being below between both but
by can could did do does doing down during each else ever every few for from further had has have having he her here
hers herself him himself his how i if in into is it its itself just like may me might more most must my myself no nor
not now of off on once one only or other our ours out over own said same shall she should so some such than that the
their theirs them themselves then there these they this those through to too under until up us very was we were what
when where which while who whom whose why will with would yes yet you your yours
""".split())


def content_words(text: str) -> list[str]:
  """The words of a text in normal form that say what it is about, in its order.

  >>> content_words("Who carved the silver whistle, and for whom?")
  ['carved', 'silver', 'whistle']
  """
  return [word for word in words(text) if word not in FUNCTION_WORDS]
