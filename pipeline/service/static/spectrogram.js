// A spectrogram on a canvas, computed here: a Hann window, an FFT, decibels, a scale of colours.

const SIZE = 1024;
const RANGE = 75; // decibels below the loudest
const TOP = 8000; // Hz
const HOP = 64; // samples from column to column, to begin with

const WINDOW = Float64Array.from({ length: SIZE }, (_, n) => 0.5 - 0.5 * Math.cos((2 * Math.PI * n) / SIZE));
const COS = Float64Array.from({ length: SIZE / 2 }, (_, k) => Math.cos((2 * Math.PI * k) / SIZE));
const SIN = Float64Array.from({ length: SIZE / 2 }, (_, k) => -Math.sin((2 * Math.PI * k) / SIZE));
const BITS = Math.log2(SIZE);
const REVERSED = Uint16Array.from({ length: SIZE }, (_, n) => {
  let place = 0;
  for (let bit = 0; bit < BITS; bit++) place |= ((n >> bit) & 1) << (BITS - 1 - bit);
  return place;
});
const real = new Float64Array(SIZE);
const imaginary = new Float64Array(SIZE);

/**
 * A wave's spectrogram over the width of a canvas, however long the wave gets. Each column is computed once: when there
 * are more than two for a pixel, every second one goes, and new ones are twice as far apart.
 */
export class Spectrogram {
  constructor(canvas, rate) {
    this.canvas = canvas;
    this.bins = Math.min(SIZE / 2, Math.floor((TOP * SIZE) / rate));
    this.columns = []; // decibels, [bins] each
    this.hop = HOP;
    this.length = 0;
    this.rest = new Float32Array(0); // the end of the wave, from what the next column begins with
  }

  /** Takes up more of the wave, float in [-1, 1]. */
  add(samples) {
    const begin = this.length - this.rest.length;
    const wave = new Float32Array(this.rest.length + samples.length);
    wave.set(this.rest);
    wave.set(samples, this.rest.length);
    this.length += samples.length;
    while (this.length > 2 * this.canvas.width * this.hop) {
      this.columns = this.columns.filter((_, n) => n % 2 === 0);
      this.hop *= 2;
    }
    let next = this.columns.length * this.hop - begin;
    for (; next + SIZE <= wave.length; next += this.hop) this.columns.push(levels(wave, next, this.bins));
    this.rest = wave.slice(Math.min(next, wave.length));
  }

  /** Takes up what is left at the wave's end, as if silence came. */
  end() {
    this.add(new Float32Array(SIZE / 2));
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    const { columns, bins } = this;
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer).fill(COLOURS[0]);
    let loudest = -Infinity;
    for (const column of columns) for (let k = 0; k < bins; k++) if (column[k] > loudest) loudest = column[k];
    const scale = (COLOURS.length - 1) / RANGE;
    for (let x = 0; columns.length && x < width; x++) {
      const column = columns[Math.floor((x * columns.length) / width)];
      for (let y = 0; y < height; y++) {
        const level = column[Math.floor(((height - 1 - y) / height) * bins)];
        const shade = (level - loudest + RANGE) * scale;
        pixels[y * width + x] = COLOURS[shade > 0 ? Math.floor(shade) : 0];
      }
    }
    context.putImageData(image, 0, 0);
  }
}

const STOPS = [[11, 15, 20], [16, 54, 74], [15, 118, 110], [94, 200, 130], [250, 240, 170]];
const COLOURS = Uint32Array.from({ length: 256 }, (_, n) => {
  const place = (n / 255) * (STOPS.length - 1);
  const low = Math.min(STOPS.length - 2, Math.floor(place));
  const colour = STOPS[low].map((from, channel) => from + (STOPS[low + 1][channel] - from) * (place - low));
  return new Uint32Array(Uint8ClampedArray.from([...colour, 255]).buffer)[0]; // in this machine's order of bytes
});

/** Decibels, [bins], of the window that begins at a sample. */
function levels(wave, start, bins) {
  for (let n = 0; n < SIZE; n++) {
    real[REVERSED[n]] = wave[start + n] * WINDOW[n];
    imaginary[n] = 0;
  }
  transform();
  const column = new Float32Array(bins);
  for (let k = 0; k < bins; k++) column[k] = 10 * Math.log10(real[k] * real[k] + imaginary[k] * imaginary[k] + 1e-9);
  return column;
}

/** Cooley and Tukey's transform of `real` and `imaginary`, in place, from the order of reversed bits. */
function transform() {
  for (let half = 1; half < SIZE; half *= 2) {
    const stride = SIZE / 2 / half;
    for (let start = 0; start < SIZE; start += 2 * half) {
      for (let k = 0; k < half; k++) {
        const cos = COS[k * stride];
        const sin = SIN[k * stride];
        const a = start + k;
        const b = a + half;
        const re = real[b] * cos - imaginary[b] * sin;
        const im = real[b] * sin + imaginary[b] * cos;
        real[b] = real[a] - re;
        imaginary[b] = imaginary[a] - im;
        real[a] += re;
        imaginary[a] += im;
      }
    }
  }
}
