import dataclasses
@dataclasses.dataclass
class VerdictSettings:
  delta: float = 0.1
