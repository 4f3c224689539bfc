"A stand-in for TensorBoard that keeps what it is told."


class Board:
    "Points and remarks, in lists."

    def __init__(self):
        self.points, self.remarks = [], []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.points.append((tag, float(value), step))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        self.points += [(tag, float(value), step) for tag, value in values.items()]

    def add_text(self, tag: str, text: str, step: int = 0) -> None:
        self.remarks.append((tag, text))

    def of(self, tag: str) -> list[tuple[float, int]]:
        "Values and steps of one tag."
        return [(value, step) for t, value, step in self.points if t == tag]
