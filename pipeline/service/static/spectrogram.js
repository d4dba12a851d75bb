// A spectrogram on a canvas, computed here: a Hann window, an FFT, decibels, a scale of colours.

const SIZE = 1024;
const RANGE = 75; // decibels below the loudest
const TOP = 8000; // Hz

/** Magnitudes in decibels, [SIZE / 2] each, of windows that begin every `hop` samples. */
export function spectra(samples, hop) {
  const window = Float32Array.from({ length: SIZE }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / SIZE));
  const rows = [];
  for (let start = 0; start + SIZE / 2 <= samples.length; start += hop) {
    const real = new Float32Array(SIZE);
    const imaginary = new Float32Array(SIZE);
    for (let n = 0; n < SIZE && start + n < samples.length; n++) real[n] = samples[start + n] * window[n];
    transform(real, imaginary);
    rows.push(Float32Array.from({ length: SIZE / 2 }, (_, k) => 10 * Math.log10(real[k] ** 2 + imaginary[k] ** 2 + 1e-9)));
  }
  return rows;
}

/** Draws a whole wave, float in [-1, 1], over the width of a canvas. */
export function draw(canvas, samples, rate) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.fillStyle = "#0b0f14";
  context.fillRect(0, 0, width, height);
  if (samples.length < SIZE) return;
  const rows = spectra(samples, Math.max(64, Math.floor(samples.length / width)));
  let loudest = -Infinity;
  for (const row of rows) for (const level of row) loudest = Math.max(loudest, level);
  const image = context.createImageData(width, height);
  const bins = Math.min(SIZE / 2, Math.floor((TOP * SIZE) / rate));
  for (let x = 0; x < width; x++) {
    const row = rows[Math.min(rows.length - 1, Math.floor((x * rows.length) / width))];
    for (let y = 0; y < height; y++) {
      const level = row[Math.floor(((height - 1 - y) / height) * bins)];
      const colour = shade(Math.min(1, Math.max(0, 1 + (level - loudest) / RANGE)));
      image.data.set([...colour, 255], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
}

const STOPS = [[11, 15, 20], [16, 54, 74], [15, 118, 110], [94, 200, 130], [250, 240, 170]];

function shade(value) {
  const place = value * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[low].map((from, channel) => from + (STOPS[low + 1][channel] - from) * (place - low));
}

/** Cooley and Tukey's transform, in place. */
function transform(real, imaginary) {
  const size = real.length;
  for (let i = 1, j = 0; i < size; i++) {
    let bit = size >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let length = 2; length <= size; length <<= 1) {
    const angle = (-2 * Math.PI) / length;
    for (let start = 0; start < size; start += length) {
      for (let k = 0; k < length / 2; k++) {
        const [cos, sin] = [Math.cos(angle * k), Math.sin(angle * k)];
        const [a, b] = [start + k, start + k + length / 2];
        const re = real[b] * cos - imaginary[b] * sin;
        const im = real[b] * sin + imaginary[b] * cos;
        [real[b], imaginary[b]] = [real[a] - re, imaginary[a] - im];
        [real[a], imaginary[a]] = [real[a] + re, imaginary[a] + im];
      }
    }
  }
}
