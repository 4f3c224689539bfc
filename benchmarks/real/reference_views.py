"""How RP4 sees a pill: its reference picture, laid as the pill lies, and photos of it in rendered scenes."""

from copy import deepcopy
from typing import NamedTuple

import cv2
import numpy as np

from pillsnap.photos.images import crop_view
from pillsnap.synth.cutouts import RealPill, cut_out
from pillsnap.synth.draws import rng_for
from pillsnap.synth.files import loose_box
from pillsnap.synth.renderer import Shot, draw_scene, photograph
from pillsnap.synth.scene import Pose

TURNS = 24  # copies of a reference picture in the gallery, at each of these heights of the camera, degrees:
HEIGHTS = (90, 76, 63)  # chosen on the pills that are held back, as TURNS
WIDTH, HEIGHT = 488, 640  # of a photo, pixels
VIEW = 1.25  # side of a view, in longer sides of the pill's box


class Look(NamedTuple):
    "How a pill is seen."

    plane: np.ndarray  # [2, 2] from its picture to the photo
    up: np.ndarray  # [2] where its height points in the photo

    def then(self, change: np.ndarray) -> "Look":
        return Look(change @ self.plane, change @ self.up)


def spin(degrees: float) -> np.ndarray:
    "The matrix that turns a picture clockwise."
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s], [s, c]])


def look(turn: float, height: float, roll: float = 0.0) -> Look:
    "How a camera sees a pill that lies turned; it stands at a height above the table and is rolled, all in degrees."
    a = np.deg2rad(height)
    return Look(np.diag([1, np.sin(a)]) @ spin(turn), np.array([0, -np.cos(a)])).then(spin(-roll))


class Shown(NamedTuple):
    "A phone's photo of one side in a scene."

    photo: np.ndarray  # uint8 [HEIGHT, WIDTH, 3]
    box: np.ndarray  # as labelled: x0, y0, x1, y1, pixels
    pose: tuple[float, float, float]  # turn of the pill, height and roll of the camera, degrees

    def view(self, size: int) -> np.ndarray:
        return crop_view(self.photo, self.box, size)


def rendered(pill: RealPill, side: int, k: int) -> Shown:
    "One side of a pill in the k-th of its scenes."
    rng = rng_for(11, "phone", pill.name, side, k)
    back, light, latitude = int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((60, 70, 75, 90)))
    shot, turn = Shot(back, light, latitude, WIDTH, HEIGHT, 31.0, "phone"), float(rng.uniform(0, 360))
    camera = draw_scene(shot, deepcopy(rng)).camera
    image, [extent] = photograph([(pill, Pose(0.0, 0.0, turn, side))], shot, rng)
    x, y, w, h = loose_box(extent, shot, rng)
    return Shown(image, np.array([x, y, x + w, y + h]), (turn, camera.latitude, camera.roll))


class Plate:
    "A reference picture, the pixels of its pill, and how thick pills of that outline usually are."

    def __init__(self, pill: RealPill, side: int):
        bgr = cv2.imread(pill.sides[side].path)
        assert bgr is not None
        mask = cut_out(bgr[..., ::-1])
        ys, xs = np.nonzero(mask)
        cut = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        upright = mask[cut].shape[0] > mask[cut].shape[1]
        self.mask = np.ascontiguousarray(np.rot90(mask[cut], upright)).astype(np.uint8) * 255
        page = np.where(mask[..., None], bgr[..., ::-1], np.uint8(128))[cut]
        self.page = np.ascontiguousarray(np.rot90(page, upright))
        self._soft: dict[int, np.ndarray] = {}  # size of a view → the picture, as soft as such a view
        self.short, self.long = self.mask.shape
        self.middle = np.array([self.long / 2, self.short / 2])
        self.outline = cv2.convexHull(np.argwhere(self.mask)[:, ::-1].astype(np.int32))[:, 0] - self.middle
        self.thick = self.short * (0.86 if self.short < 0.5 * self.long else 0.44)

    def box(self, at: Look) -> np.ndarray:
        "The pill's bounding box about the middle of its foot: x0, y0, x1, y1, in pixels of the picture."
        points, rims = self.outline @ at.plane.T, np.outer((0.3 * self.thick, 0.7 * self.thick), at.up)
        return np.concatenate([points.min(0) + rims.min(0), points.max(0) + rims.max(0)])

    def reach(self, at: Look) -> float:
        "The longer side of the pill's box."
        box = self.box(at)
        return float(max(box[2:] - box[:2]))

    def _onto(self, at: Look, size: int) -> np.ndarray:
        "The affine matrix from the picture to a view of the box."
        box, zoom = self.box(at), size / (VIEW * self.reach(at))
        start = self.thick * at.up - at.plane @ self.middle - (box[:2] + box[2:]) / 2
        return np.column_stack([zoom * at.plane, zoom * start + size / 2])

    def laid(self, at: Look, size: int) -> np.ndarray:
        "The pill as it looks when it lies on grey, cut out like a view of a photo."
        if size not in self._soft:
            self._soft[size] = cv2.GaussianBlur(self.page, (0, 0), max(0.3, 0.45 * VIEW * self.long / size))
        return cv2.warpAffine(self._soft[size], self._onto(at, size), (size, size), borderValue=(128, 128, 128))

    def cover(self, at: Look, cells: int) -> np.ndarray:
        "How much of each cell of a view the pill covers: uint8 [cells, cells]."
        mask = cv2.warpAffine(self.mask, self._onto(at, 4 * cells), (4 * cells, 4 * cells))
        return cv2.resize(mask, (cells, cells), interpolation=cv2.INTER_AREA)

    def turned(self, size: int) -> list[np.ndarray]:
        "The reference at all angles of the gallery."
        step = 360 / TURNS
        return [self.laid(look(step * (k + n / 2), h), size) for n, h in enumerate(HEIGHTS) for k in range(TURNS)]


def relief(plate: Plate) -> float:
    "How much print, scores and relief a reference picture shows: the spread of its brightness about its own blur."
    grey = cv2.cvtColor(plate.page, cv2.COLOR_RGB2GRAY).astype(np.float32)
    inside = cv2.erode(plate.mask, np.ones((25, 25), np.uint8)) > 0
    return float((grey - cv2.GaussianBlur(grey, (0, 0), 8))[inside].std())
