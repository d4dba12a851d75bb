// Sound that is heard while it arrives, and as a file when it is all there.

/** Plays pieces of a wave one after another, without gaps as long as they come in time. */
export class Stream {
  constructor(rate) {
    this.rate = rate;
    this.context = new AudioContext({ sampleRate: rate });
    this.next = 0;
    this.sources = new Set();
  }

  add(samples) {
    const buffer = this.context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    this.next = Math.max(this.next, this.context.currentTime + 0.05);
    source.start(this.next);
    this.next += buffer.duration;
    this.sources.add(source);
    source.onended = () => {
      this.sources.delete(source);
      if (!this.sources.size) this.onidle?.();
    };
  }

  stop() {
    for (const source of this.sources) source.stop();
    if (this.context.state !== "closed") this.context.close();
  }
}

/** A WAV file, 16 bits, mono, as it arrives; the one that comes of it keeps what its header says of its origin. */
export class WavReader {
  constructor() {
    this.rate = null;
    this.header = null;
    this.rest = new Uint8Array(0);
    this.sound = [];
  }

  /** Samples in [-1, 1] of the bytes that came; what does not make a whole one waits for the next. */
  read(bytes) {
    let all = new Uint8Array(this.rest.length + bytes.length);
    all.set(this.rest);
    all.set(bytes, this.rest.length);
    if (!this.header) {
      const end = WavReader.beginning(all);
      if (!end) {
        this.rest = all;
        return new Float32Array(0);
      }
      this.header = all.slice(0, end);
      this.rate = new DataView(this.header.buffer).getUint32(24, true);
      all = all.slice(end);
    }
    const count = all.length >> 1;
    this.rest = all.slice(2 * count);
    this.sound.push(all.slice(0, 2 * count));
    const view = new DataView(all.buffer);
    return Float32Array.from({ length: count }, (_, n) => view.getInt16(2 * n, true) / 32768);
  }

  /** The file, with its length, which a stream does not know. */
  file() {
    const header = this.header.slice();
    const size = this.sound.reduce((sum, part) => sum + part.length, 0);
    const view = new DataView(header.buffer);
    view.setUint32(4, header.length - 8 + size, true);
    view.setUint32(header.length - 4, size, true);
    return new Blob([header, ...this.sound], { type: "audio/wav" });
  }

  /** Where the sound begins, or 0 if that has not come yet. */
  static beginning(bytes) {
    const view = new DataView(bytes.buffer);
    for (let place = 12; place + 8 <= bytes.length; ) {
      if (String.fromCharCode(...bytes.subarray(place, place + 4)) === "data") return place + 8;
      const size = view.getUint32(place + 4, true);
      place += 8 + size + (size % 2);
    }
    return 0;
  }
}
