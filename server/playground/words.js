// Numbers and sizes as people read them, none of them parted from its unit at the end of a line.

const SPACE = "\u00a0";

/** Seconds, in the unit that needs no leading zeros. */
export function time(seconds) {
  if (seconds >= 100) return `${Math.round(seconds)}${SPACE}s`;
  if (seconds >= 1) return `${seconds.toPrecision(seconds >= 10 ? 3 : 2)}${SPACE}s`;
  if (seconds >= 0.0995) return `${Math.round(seconds * 1000)}${SPACE}ms`;
  return `${Number((seconds * 1000).toPrecision(2))}${SPACE}ms`;
}

/** "39 x", never more digits than such a figure deserves. */
export function ratio(value) {
  return `${value >= 10 ? Math.round(value) : value.toPrecision(2)}${SPACE}×`;
}

/** How long ago, roughly. */
export function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** "256 px" for a square of 256x256, "832 × 480 px, 81 frames" for a film. */
export function sizeText(size) {
  const [width, height, frames] = size.split("x");
  const plane = width === height ? `${width}${SPACE}px` : `${width} × ${height}${SPACE}px`;
  return frames ? `${plane}, ${frames} frames` : plane;
}
