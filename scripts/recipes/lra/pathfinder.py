"""Pathfinder of Long Range Arena, made from a seed: two dashed curves among shorter ones; do two discs mark the same one?

The images are those of https://github.com/drewlinsley/pathfinder (Linsley et al., "Learning long-range spatial dependencies
with horizontal gated recurrent units", 2018) at LRA's settings for 32 x 32 pixels and contours of 14 segments, the "hard"
ones. That program tries some 470 times for each image, one attempt after the other. Here the attempts of a chunk of images
advance together, one segment each, in arrays: `lanes`.

Coordinates are (y, x) in pixels. A segment is a row (y, x, patch): where its drawing begins, and which of the cached drawings
it is. Arrays of masks have a margin of `PAD` pixels around the window, always 0, so that patches fit everywhere.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from hf_specattn.files import remove_leftovers, replace_folder, temporary_name, write_bytes

from .parallel import in_order

WINDOW, BORDER, SEED_DISTANCE = 32, 1, 7
LENGTH, MARGIN, THICKNESS, SCALE = 2, 1, 0.5, 2  # of a segment; SCALE: drawn larger and reduced
SEGMENTS, DISTRACTORS, DISTRACTOR_SEGMENTS = 14, 5, 4
TARGET_CONTRAST, DISTRACTOR_CONTRAST, MARKER_RADIUS = 2 * 0.75, 2.0, 1.5
CONTINUITY, TRIES, DISTRACTOR_TRIES = 1.0, 3, 5
OVERLAP, OCCUPIED, LEAST_FREE = 1.8, 0.3, 0.01

IMAGES_PER_CHUNK, LANES = 500, 256
FOLDER = "curv_contour_length_14"

PAD = 8
SIDE = WINDOW + 2 * PAD
REACH = LENGTH + int(np.ceil(THICKNESS)) + MARGIN  # pixels around a segment's beginning that its patch covers
PATCH = 2 * REACH + 1
SEEDS = 360  # patches of first segments, one for each degree; those of the others follow

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tables:
    """What depends on a segment's direction alone.

    Attributes:
        candidates: (C, 2), pixels on the circle where a segment may end, from its pivot.
        orientations: (360 + C,), radians.
        weights: (360 + C, C), how well a candidate continues an orientation.
        lines, masks: (360 + C, PATCH^2), the drawings in [0, 1].
        to_head, to_pivot, to_next: (360 + C, 2), steps from tail to head, head to pivot, and pivot to the next one.
        footprints: for each seed the pixels, from its tail, that must be free.
        border: (SIDE^2,), the mask of an empty image.
        inside: (SIDE^2,), 1 in the window.
        first: (k, 3), the segments that an image may begin with, and `first_shares` (k,), their cumulated probabilities.
        disc: (PATCH^2,), the marker.
    """

    candidates: Integers
    orientations: Floats
    weights: Floats
    lines: Floats
    masks: Floats
    to_head: Integers
    to_pivot: Integers
    to_next: Integers
    footprints: list[Integers]
    border: Floats
    inside: Floats
    first: Integers
    first_shares: Floats
    disc: Floats


def step_of(orientations: Floats, distance: float) -> Integers:
    """The step in whole pixels, rounded up; what is a whole number but for roundoff stays one."""
    exact = distance * np.stack([np.sin(orientations), np.cos(orientations)], axis=-1)
    return np.ceil(exact.round(9)).astype(np.int64)


def opposite(orientations: Floats) -> Floats:
    return np.where(orientations < 0, orientations + np.pi, orientations - np.pi)


def reduced(image: NDArray[np.uint8], side: int) -> Floats:
    """A drawing reduced to `side` pixels, in [0, 1]."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), dtype=np.float64) / 255


def disk(radius: int) -> NDArray[np.bool_]:
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def draw_segment(orientation: float) -> tuple[Floats, Floats]:
    """A segment from the middle of its patch, and its mask: the drawing widened by the margin."""
    center = REACH * SCALE
    large = Image.new("L", (2 * center + 1, 2 * center + 1))
    dy, dx = step_of(np.array([orientation]), LENGTH * SCALE)[0]
    line = [(center, center), (center + int(dx), center + int(dy))]
    ImageDraw.Draw(large).line(line, fill=255, width=int(THICKNESS * SCALE))
    widened = ndimage.grey_dilation(np.asarray(large), footprint=disk(MARGIN * SCALE))
    return reduced(np.asarray(large), PATCH).ravel(), reduced(widened, PATCH).ravel()


@lru_cache(maxsize=1)
def tables() -> Tables:
    """Make the tables, in a fraction of a second."""
    radius = LENGTH + MARGIN
    angles = np.arange(0, 360, 360 / (2 * radius * np.pi)) * np.pi / 180
    circle = np.floor(radius * np.stack([np.sin(angles), np.cos(angles)], axis=-1)).astype(np.int64)
    candidates = np.unique(circle, axis=0)
    of_candidates = np.arctan2(candidates[:, 0], candidates[:, 1])
    of_seeds = np.arange(-180, 180) * np.pi / 180
    orientations = np.concatenate([of_seeds, of_candidates])
    turn = np.abs(of_candidates - orientations[:, None])
    turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * CONTINUITY, np.pi / 2)
    # A later segment is drawn from its end back to its pivot.
    drawn = [draw_segment(angle) for angle in np.concatenate([of_seeds, opposite(of_candidates)])]
    lines, masks = (np.stack(part) for part in zip(*drawn))
    # The original dilates by a kernel of 7 x 7 whose tail stands one pixel off its middle, and so would begin curves on the
    # window's last row and column, too: here the tail itself must be free.
    places = np.argwhere(np.ones((PATCH, PATCH))) - REACH + 1
    kernel, tail = np.abs(places).max(axis=1) <= radius, (places == 0).all(axis=1)
    footprints = [places[((mask == 1) & kernel) | tail] for mask in masks[:SEEDS]]
    inside = np.zeros((SIDE, SIDE))
    inside[PAD:-PAD, PAD:-PAD] = 1
    border = inside.copy()
    border[PAD + BORDER : -PAD - BORDER, PAD + BORDER : -PAD - BORDER] = 0
    edges = inside.copy()
    edge = PAD + 2 * SEED_DISTANCE
    edges[edge:-edge, edge:-edge] = 0
    to_head, to_next = step_of(orientations, LENGTH), step_of(orientations, LENGTH + 2 * MARGIN)
    to_pivot = step_of(opposite(orientations), LENGTH + MARGIN)
    first, odds = [], []
    for seed, footprint in enumerate(footprints):
        tails = np.argwhere(free_pixels(edges.ravel()[None], footprint)[0])
        for tail in tails:  # every direction alike, then every free pixel; drawn again where it leaves the window
            head = tail + to_head[seed]
            if is_inside(np.stack([head, head + to_pivot[seed]])).all():
                first.append([*tail, seed])
                odds.append(1 / len(tails))
    y, x = np.ogrid[-SIDE:SIDE, -SIDE:SIDE]
    circle_image = np.where(x**2 + y**2 <= (MARKER_RADIUS * SCALE) ** 2, 255, 0).astype(np.uint8)
    middle = slice(SIDE // 2 - REACH, SIDE // 2 + REACH + 1)
    disc = reduced(circle_image, SIDE)[middle, middle].ravel()
    return Tables(
        *(candidates, orientations, np.cos(turn) ** 2, lines, masks, to_head, to_pivot, to_next),
        *(footprints, border.ravel(), inside.ravel()),
        *(np.array(first), np.cumsum(odds) / np.sum(odds), disc),
    )


def free_pixels(masks: Floats, footprint: Integers) -> NDArray[np.bool_]:
    """Where a footprint meets nothing, (lanes, WINDOW, WINDOW), in masks (lanes, SIDE^2)."""
    occupied = (masks > OCCUPIED).reshape(-1, SIDE, SIDE)
    found = np.zeros((len(masks), WINDOW, WINDOW), dtype=bool)
    for dy, dx in footprint.tolist():
        found |= occupied[:, PAD + dy : PAD + dy + WINDOW, PAD + dx : PAD + dx + WINDOW]
    return ~found


def place_of(coordinates: Integers) -> Integers:
    """Index of pixels (..., 2) in a flat mask."""
    return (coordinates[..., 0] + PAD) * SIDE + coordinates[..., 1] + PAD


def is_inside(coordinates: Integers) -> Any:
    return ((coordinates >= 0) & (coordinates < WINDOW)).all(axis=-1)


AROUND = (np.arange(-REACH, REACH + 1)[:, None] * SIDE + np.arange(-REACH, REACH + 1)).ravel()
CROSS = np.array([0, -SIDE, SIDE, -1, 1])


def add_masks(masks: Floats, lanes: Integers, segments: Integers) -> None:
    """Add the masks of segments (lanes, 3), one to each lane named."""
    table = tables()
    places = place_of(segments[:, :2])[:, None] + AROUND
    drawn = table.masks[segments[:, 2]] * table.inside[places]
    rows = lanes[:, None]
    masks[rows, places] = np.maximum(masks[rows, places], drawn)


def extend(
    masks: Floats, pivots: Integers, last: Integers, draws: Floats
) -> tuple[NDArray[np.bool_], Integers, Integers]:
    """Try to add one segment in each lane.

    Args:
        masks: (lanes, SIDE^2); where it succeeds the mask of the segment *before* is added.
        pivots: (lanes, 2), those of the segments before.
        last: (lanes, 3), the segments before.
        draws: (lanes, TRIES), uniform numbers.

    Returns:
        Whether it succeeded, the new pivots and the new segments.
    """
    table = tables()
    pivots = pivots + table.to_next[last[:, 2]]
    ends = pivots[:, None] + table.candidates  # (lanes, C, 2)
    lanes = np.arange(len(masks))
    near = masks[lanes[:, None, None], place_of(ends)[..., None] + CROSS].max(axis=-1)
    weights = (1 - near) * table.weights[last[:, 2]] * is_inside(ends)
    total = weights.sum(axis=1)
    shares = np.cumsum(weights, axis=1) / np.maximum(total, 1e-30)[:, None]
    chosen = (shares[:, None] > draws[..., None]).argmax(axis=-1)  # (lanes, TRIES)
    places = place_of(ends[lanes[:, None], chosen])[..., None] + AROUND
    places = np.where((total >= 1e-4)[:, None, None], places, AROUND - AROUND[0])  # no candidate: may lie anywhere
    crowded = masks[lanes[:, None, None], places] + table.masks[SEEDS + chosen]
    fits = (crowded.max(axis=-1) < OVERLAP) & (total >= 1e-4)[:, None]
    found, pick = fits.any(axis=1), chosen[lanes, fits.argmax(axis=1)]
    add_masks(masks, lanes[found], last[found])
    return found, pivots, np.column_stack([ends[lanes, pick], SEEDS + pick])


# --- the two long curves ---------------------------------------------------------------------------------------------


def two_seeds(generator: np.random.Generator, count: int) -> tuple[Integers, Integers]:
    """First segments (count, 2, 3) of both curves and their pivots (count, 2, 2), both near the middle."""
    table = tables()
    first = table.first[np.searchsorted(table.first_shares, generator.random(count), side="right")]
    angles = generator.integers(0, 360, count) * np.pi / 180
    around = SEED_DISTANCE * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    second = np.column_stack([np.rint(first[:, :2] + around).astype(np.int64), generator.integers(0, SEEDS, count)])
    segments = np.stack([first, second], axis=1)
    patches = segments[..., 2]
    return segments, segments[..., :2] + table.to_head[patches] + table.to_pivot[patches]


def two_curves(generator: np.random.Generator, count: int) -> tuple[Integers, Floats]:
    """Segments (count, 2, SEGMENTS, 3) of both curves, and what they leave free: masks (count, SIDE^2)."""
    table, steps_needed = tables(), 2 * (SEGMENTS - 1)
    masks = np.tile(table.border, (LANES, 1))
    segments = np.zeros((LANES, 2, SEGMENTS, 3), dtype=np.int64)
    segments[:, :, 0], pivots = two_seeds(generator, LANES)
    steps, lanes = np.zeros(LANES, dtype=np.int64), np.arange(LANES)
    done: list[tuple[Integers, Floats]] = []
    while len(done) < count:
        curve, number = steps % 2, steps // 2  # the curves grow in turn
        last = segments[lanes, curve, number]
        found, new_pivots, new = extend(masks, pivots[lanes, curve], last, generator.random((LANES, TRIES)))
        pivots[lanes, curve], segments[lanes, curve, number + 1] = new_pivots, new
        steps += 1
        complete = found & (steps == steps_needed)
        if complete.any():
            # Of the two last segments the original adds the mask of the second alone.
            add_masks(masks, lanes[complete], segments[complete, 1, -1])
            done += zip(segments[complete].copy(), masks[complete].copy())
        again = lanes[~found | complete]
        masks[again], steps[again] = table.border, 0
        segments[again, :, 0], pivots[again] = two_seeds(generator, len(again))
    curves, left = zip(*done[:count])
    return np.stack(curves), np.stack(left)


# --- distractors -----------------------------------------------------------------------------------------------------


def one_seed(generator: np.random.Generator, mask: Floats) -> tuple[Integers, Integers] | None:
    """First segment (3,) of a distractor and its pivot, anywhere that is free; None where there is no place."""
    table = tables()
    if (mask[table.inside == 1] <= OCCUPIED).mean() < LEAST_FREE:
        return None
    for _ in range(TRIES):
        patch = int(generator.integers(0, SEEDS))
        free = np.argwhere(free_pixels(mask[None], table.footprints[patch])[0])
        if not len(free):
            return None
        tail = free[int(generator.random() * len(free))]
        head = tail + table.to_head[patch]
        pivot = head + table.to_pivot[patch]
        if is_inside(np.stack([head, pivot])).all():
            return np.array([*tail, patch]), pivot
    return None


def add_distractors(generator: np.random.Generator, masks: Floats) -> list[list[Integers]]:
    """Distractors of each image, (DISTRACTOR_SEGMENTS, 3) each; some images have room for fewer. Masks are updated."""
    found: list[list[Integers]] = [[] for _ in masks]
    for _ in range(DISTRACTORS):
        waiting = np.arange(len(masks))
        for _ in range(DISTRACTOR_TRIES):
            seeds = [one_seed(generator, masks[image]) for image in waiting]
            placed = [place for place, seed in enumerate(seeds) if seed is not None]
            if not placed:
                continue
            images, trial = waiting[placed], masks[waiting[placed]]
            segments = np.zeros((len(placed), DISTRACTOR_SEGMENTS, 3), dtype=np.int64)
            segments[:, 0], pivots = (np.stack(part) for part in zip(*(seeds[place] for place in placed)))
            whole = np.ones(len(placed), dtype=bool)
            for number in range(1, DISTRACTOR_SEGMENTS):
                draws = generator.random((len(placed), TRIES))
                success, pivots, segments[:, number] = extend(trial, pivots, segments[:, number - 1], draws)
                whole &= success
                # A lane that failed goes on where it can do no harm, and is left out in the end.
                pivots[~whole], segments[~whole, number] = WINDOW // 2, (WINDOW // 2, WINDOW // 2, 0)
            add_masks(trial, np.flatnonzero(whole), segments[whole, -1])
            masks[images[whole]] = trial[whole]
            for image, segment in zip(images[whole].tolist(), segments[whole]):
                found[image].append(segment)
            waiting = np.setdiff1d(waiting, images[whole])
            if not len(waiting):
                break
    return found


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathfinderImage:
    """Attributes: `pixels` (32, 32) in 0-255; `label` 1: both discs on one curve; `curves` (2, 14, 3) and `distractors`
    (4, 3) each, the segments; `markers` (2, 2), the discs' centers: a beginning and an end of a curve."""

    pixels: NDArray[np.uint8]
    label: int
    curves: Integers
    distractors: list[Integers]
    markers: Integers


def make_images(seed: int, chunk: int, count: int) -> list[PathfinderImage]:
    """The images of a chunk: a function of seed and chunk."""
    generator = np.random.default_rng([seed, chunk])
    curves, masks = two_curves(generator, count)
    distractors = add_distractors(generator, masks)
    labels, origins = generator.integers(0, 2, (2, count))
    images = []
    for each, others, label, origin in zip(curves, distractors, labels.tolist(), origins.tolist()):
        beginning, end = each[origin, 0, :2], each[origin if label else 1 - origin, -1, :2]
        markers = np.stack([beginning, end])
        images.append(PathfinderImage(render(each, others, markers), label, each, others, markers))
    return images


def render(curves: Integers, distractors: list[Integers], markers: Integers) -> NDArray[np.uint8]:
    """The picture, its darkest pixel 0 and its brightest 255."""
    table, canvas = tables(), np.zeros(SIDE * SIDE)

    def draw(at: Integers, drawing: Floats) -> None:
        places = place_of(at) + AROUND
        canvas[places] = np.maximum(canvas[places], drawing)

    for segment in curves.reshape(-1, 3):
        draw(segment[:2], TARGET_CONTRAST * table.lines[segment[2]])
    for segment in (each for distractor in distractors for each in distractor):
        draw(segment[:2], DISTRACTOR_CONTRAST * table.lines[segment[2]])
    for marker in markers:
        draw(marker, table.disc)
    window = canvas.reshape(SIDE, SIDE)[PAD:-PAD, PAD:-PAD]
    low, high = window.min(), window.max()
    return ((window - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


def write_chunk(root: str, seed: int, chunk: int, count: int) -> None:
    """Make the files of a chunk of images, its metadata last; does nothing if they exist."""
    folder = Path(root)
    metadata = folder / "metadata" / f"{chunk}.npy"
    if metadata.exists():
        return
    temporary = folder / "imgs" / temporary_name(str(chunk))
    temporary.mkdir(parents=True, exist_ok=True)
    metadata.parent.mkdir(exist_ok=True)
    lines = []
    for index, image in enumerate(make_images(seed, chunk, count)):
        name = f"sample_{index}.png"
        Image.fromarray(image.pixels).save(temporary / name)
        settings = (CONTINUITY, SEGMENTS, DISTRACTOR_SEGMENTS, LENGTH, THICKNESS, MARGIN, 1)
        lines.append(" ".join(map(str, (f"imgs/{chunk}", name, index, image.label, *settings))))
    replace_folder(temporary, folder / "imgs" / str(chunk))
    write_bytes(metadata, ("\n".join(lines) + "\n").encode())  # plain text, as in LRA's release


def write_images(root: Path, seed: int, count: int, processes: int, per_chunk: int = IMAGES_PER_CHUNK) -> None:
    """Make at least `count` images below `root`, in LRA's layout; a repeated call goes on where it was interrupted."""
    remove_leftovers(root / FOLDER / "imgs")
    jobs = [(str(root / FOLDER), seed, chunk, per_chunk) for chunk in range(-(-count // per_chunk))]
    for _ in in_order(write_chunk, jobs, processes):
        pass
