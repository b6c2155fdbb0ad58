"""The shapes of things, as polygons in metres.

Colours overlap between the classes on purpose: cars, walls, clothes, hulls, balls and signs share one
palette. What a thing is shows in its shape and its surroundings, so that a model has to learn those.

Shapes: K corners of a polygon; x to the right, y up, (0, 0) where the thing stands.
"""

from __future__ import annotations

import numpy as np

from pipelines.data.scenes.drawing import Colour, Part, pick

PAINTS = ((188, 52, 44), (46, 88, 170), (232, 230, 224), (226, 180, 52), (54, 132, 124), (126, 128, 130))
PAINTS += ((128, 84, 52), (216, 122, 52), (118, 74, 138), (52, 54, 62), (96, 140, 66), (206, 190, 152))
LEAVES = ((64, 112, 44), (92, 128, 52), (48, 88, 48), (140, 138, 56), (186, 118, 44), (112, 120, 74))
SKINS = ((236, 196, 164), (198, 146, 108), (134, 90, 62), (88, 58, 42))
WOOD = (96, 70, 50)
GLASS = (72, 92, 112)
DARK = (38, 38, 42)


def box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Corners of a rectangle, [4, 2]."""
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def ellipse(x: float, y: float, rx: float, ry: float, corners: int = 18) -> np.ndarray:
    """Corners of an ellipse, [K, 2]."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def bar(start: tuple[float, float], end: tuple[float, float], width: float) -> np.ndarray:
    """A straight limb of the given width, [4, 2]."""
    a, b = np.array(start), np.array(end)
    along = (b - a) / max(float(np.hypot(*(b - a))), 1e-9)
    side = np.array([-along[1], along[0]]) * width / 2
    return np.array([a + side, b + side, b - side, a - side])


def blob(rng: np.random.Generator, x: float, y: float, rx: float, ry: float, rough: float = 0.12) -> np.ndarray:
    """An ellipse with an uneven edge, [K, 2]."""
    points = ellipse(0, 0, 1, 1, 22) * (1 + rng.uniform(-rough, rough, (22, 1)))
    return points * (rx, ry) + (x, y)


# ---------------------------------------------------------------- things


def person(rng: np.random.Generator) -> list[Part]:
    """Standing or walking, 1.5 to 1.9 m."""
    shirt, trousers, skin = pick(rng, PAINTS), pick(rng, PAINTS), pick(rng, SKINS, 8)
    hair = pick(rng, (DARK, WOOD, (200, 170, 110), (150, 150, 150)), 8)
    stride, arm, build = rng.uniform(0.05, 0.3), rng.uniform(0.1, 0.45), rng.uniform(1.05, 1.3)
    parts = [
        Part(bar((-0.09, 0.9), (-stride, 0.0), 0.24), trousers),
        Part(bar((0.09, 0.9), (stride, 0.0), 0.24), trousers * 0.8),
    ]
    parts += [Part(bar((side * 0.2, 1.4), (side * (0.22 + arm * 0.5), 0.85), 0.15), shirt * 0.82) for side in (-1, 1)]
    parts += [
        Part(np.array([(-0.2, 0.82), (0.2, 0.82), (0.27, 1.42), (0.12, 1.5), (-0.12, 1.5), (-0.27, 1.42)]), shirt)
    ]
    parts += [Part(ellipse(0, 1.66, 0.155, 0.19), hair), Part(ellipse(0.03, 1.62, 0.12, 0.15), skin)]
    tall = rng.uniform(0.86, 1.08)
    return [Part(part.points * (build * tall, tall), part.colour) for part in parts]


def car(rng: np.random.Generator) -> list[Part]:
    """From the side (saloon, hatchback or van) or from behind."""
    paint, lamp = pick(rng, PAINTS), np.array((200, 40, 36) if rng.random() < 0.5 else (250, 240, 200))
    if rng.random() < 0.35:
        return _car_end(paint, lamp)
    roof, rear, front = ((1.45, -1.5, 0.55), (1.5, -1.95, 0.7), (1.95, -2.05, 1.5))[rng.integers(3)]
    cabin = np.array([(rear - 0.15, 0.85), (rear + 0.35, roof), (front, roof), (front + 0.75, 0.85)])
    body = np.array([(-2.15, 0.35), (2.15, 0.35), (2.2, 0.7), (1.9, 0.92), (-2.1, 0.98)])
    parts = [Part(body, paint), Part(cabin, paint)]
    pane = (cabin - cabin.mean(0)) * (0.82, 0.66) + cabin.mean(0) + (0, 0.03)
    middle = pane[:, 0].mean()
    parts += [Part(pane, np.array(GLASS)), Part(box(middle - 0.06, 0.85, middle + 0.06, roof - 0.05), paint * 0.9)]
    parts += [Part(box(-2.18, 0.66, -1.98, 0.86), lamp), Part(box(-2.1, 0.34, 2.12, 0.46), paint * 0.55)]
    for x in (-1.3, 1.35):
        parts += [
            Part(ellipse(x, 0.36, 0.4, 0.38), np.array(DARK)),
            Part(ellipse(x, 0.36, 0.19, 0.18), np.array((170, 172, 176))),
        ]
    return parts


def _car_end(paint: Colour, lamp: Colour) -> list[Part]:
    cabin = np.array([(-0.9, 0.95), (-0.68, 1.5), (0.68, 1.5), (0.9, 0.95)])
    parts = [Part(box(x - 0.14, 0.0, x + 0.14, 0.5), np.array(DARK)) for x in (-0.7, 0.7)]
    parts += [Part(box(-0.95, 0.26, 0.95, 0.98), paint), Part(cabin, paint)]
    parts += [
        Part((cabin - (0, 1.2)) * (0.82, 0.7) + (0, 1.22), np.array(GLASS)),
        Part(box(-0.95, 0.26, 0.95, 0.4), paint * 0.5),
    ]
    parts += [Part(box(x - 0.15, 0.66, x + 0.15, 0.84), lamp) for x in (-0.76, 0.76)]
    return [*parts, Part(box(-0.27, 0.46, 0.27, 0.6), np.array((232, 230, 214)))]


def house(rng: np.random.Generator) -> list[Part]:
    """Walls of courses, a gable or hipped roof, windows and a door."""
    half, wall, roof = rng.uniform(2.8, 4.6), rng.uniform(3.0, 5.2), rng.uniform(1.6, 3.0)
    paint, tiles = pick(rng, PAINTS), pick(rng, ((150, 70, 50), (84, 70, 66), (98, 104, 114), (172, 110, 70)))
    peak = rng.choice([0.0, half * 0.55])
    parts = [
        Part(box(half * 0.4, wall, half * 0.4 + 0.8, wall + roof * 1.1), paint * 0.6),
        Part(box(-half, 0, half, wall), paint),
    ]
    parts += [Part(box(-half, y, half, y + 0.12), paint * 0.82) for y in np.arange(0.5, wall, 0.7)]
    eaves = half + 0.45
    parts += [Part(np.array([(-eaves, wall), (eaves, wall), (peak, wall + roof), (-peak, wall + roof)]), tiles)]
    pane = np.array(GLASS) if rng.random() < 0.7 else np.array((250, 214, 130))
    columns = int(rng.integers(2, 5))
    for y in (1.1, 3.2)[: 1 + (wall > 4.3)]:
        for x in np.linspace(-half, half, columns + 2)[1:-1]:
            parts += [
                Part(box(x - 0.5, y, x + 0.5, y + 1.15), np.array((226, 222, 212))),
                Part(box(x - 0.38, y + 0.12, x + 0.38, y + 1.03), pane),
            ]
    door = rng.uniform(-0.3, 0.3) * half
    return [*parts, Part(box(door - 0.5, 0, door + 0.5, 2.0), pick(rng, PAINTS) * 0.7)]


def tree(rng: np.random.Generator) -> list[Part]:
    """Broad-leaved, or a conifer in tiers."""
    leaf, height = pick(rng, LEAVES), rng.uniform(4.5, 8.5)
    backbone = Part(bar((0, 0), (0, height * 0.6), 0.05 * height), pick(rng, (WOOD, (128, 116, 104)), 8), 0.12)
    if rng.random() < 0.35:
        tiers = [(0.16, 0.30, 0.62), (0.38, 0.24, 0.82), (0.6, 0.17, 1.0)]
        points = [np.array([(-half, low), (half, low), (0, top)]) * height for low, half, top in tiers]
        return [backbone, *(Part(p, leaf * (0.66 + 0.1 * k), 0.26) for k, p in enumerate(points))]
    parts = [backbone]
    for k in range(int(rng.integers(4, 7))):
        x, y = rng.normal(0, 0.11), rng.uniform(0.52, 0.8)
        size = rng.uniform(0.15, 0.23)
        parts.append(
            Part(blob(rng, x * height, y * height, size * height, size * height * 0.9), leaf * (0.84 + 0.06 * k), 0.34)
        )
    return parts


def boat(rng: np.random.Generator) -> list[Part]:
    """A sailing boat, or a motor boat with a cabin."""
    half, paint = rng.uniform(2.0, 3.4), pick(rng, PAINTS)
    hull = np.array([(-half, 0.95), (-half * 0.8, 0), (half * 0.7, 0), (half * 1.1, 1.05)])
    stripe = Part(
        np.array([(-half, 0.95), (-half * 0.97, 0.78), (half * 1.05, 0.86), (half * 1.1, 1.05)]), paint * 0.65
    )
    if rng.random() < 0.35:
        cabin = Part(
            np.array([(-half * 0.6, 0.9), (-half * 0.55, 1.9), (half * 0.2, 1.9), (half * 0.4, 0.9)]), pick(rng, PAINTS)
        )
        return [Part(hull, paint), cabin, Part(box(-half * 0.42, 1.3, half * 0.16, 1.72), np.array(GLASS)), stripe]
    mast, sail = half * rng.uniform(1.9, 2.5), pick(rng, (*PAINTS, (240, 238, 230), (240, 238, 230)))
    main = np.array([(-half * 0.9, 1.35), (-0.12, 1.25), (-0.12, mast)])
    jib = np.array([(0.14, 1.3), (half * 0.95, 1.2), (0.14, mast * 0.86)])
    return [
        Part(bar((0, 0.8), (0, mast + 0.2), 0.14), np.array(WOOD)),
        Part(main, sail),
        Part(jib, sail * 0.88),
        Part(hull, paint),
        stripe,
    ]


def ball(rng: np.random.Generator) -> list[Part]:
    """A striped or plain beach ball."""
    radius, turn, first = rng.uniform(0.34, 0.62), rng.uniform(0, np.pi), pick(rng, PAINTS)
    parts = [Part(ellipse(0, radius, radius, radius, 26), first)]
    second = pick(rng, PAINTS)
    for start in (0.0, 2.1, 4.2)[: 3 * int(rng.random() < 0.75)]:
        edge = np.linspace(start + turn, start + turn + 1.05, 7)
        rim = np.stack([np.cos(edge), 1 + np.sin(edge)], 1) * radius
        parts.append(Part(np.concatenate([[(0, radius)], rim]), second))
    return [
        *parts,
        Part(ellipse(-0.28 * radius, 1.42 * radius, 0.2 * radius, 0.15 * radius), np.clip(first + 70, 0, 252)),
    ]


def bird(rng: np.random.Generator) -> list[Part]:
    """In flight, 1 m between the tips of its wings (its size is not to scale with what stands)."""
    paint = pick(rng, ((52, 50, 54), (236, 236, 234), (120, 110, 104), (128, 84, 52), (70, 90, 130)), 10)
    lift, droop = rng.uniform(0.14, 0.34), rng.uniform(-0.06, 0.14)
    parts = []
    for side, shade in ((-1, 0.86), (1, 1.0)):
        wing = np.array([(0.02, 0.1), (0.2, lift + 0.06), (0.5, droop + 0.06), (0.24, lift - 0.12), (0.04, -0.07)])
        parts.append(Part(wing * (side, 1), paint * shade))
    body = np.concatenate([ellipse(0, 0, 0.15, 0.085, 12), [(0.15, 0.0)]])
    return [
        *parts,
        Part(body, paint * 0.92),
        Part(np.array([(0.12, 0.05), (0.12, -0.03), (0.22, 0.0)]), np.array((226, 160, 50))),
    ]


def sign(rng: np.random.Generator) -> list[Part]:
    """A road sign or a notice board on a thin post."""
    paint, rim, high = pick(rng, PAINTS), pick(rng, PAINTS), rng.uniform(1.9, 2.7)
    shapes = (
        ellipse(0, 0, 0.5, 0.5),
        np.array([(-0.56, -0.4), (0.56, -0.4), (0, 0.56)]),
        box(-0.46, -0.46, 0.46, 0.46),
        box(-0.75, -0.4, 0.75, 0.4),
    )
    plate = shapes[rng.integers(len(shapes))]
    post = Part(bar((0, 0), (0, high), 0.15), pick(rng, ((150, 152, 156), (88, 90, 94), WOOD), 8))
    glyph = Part(box(-0.2, -0.1, 0.2, 0.06) + (0, high), np.clip(rim * 0.5, 0, 250))
    return [post, Part(plate + (0, high), rim), Part(plate * 0.76 + (0, high), paint), glyph]


THINGS = {
    "person": person,
    "car": car,
    "house": house,
    "tree": tree,
    "boat": boat,
    "ball": ball,
    "bird": bird,
    "sign": sign,
}
"""The function that draws each thing class, in the order of the category ids."""
