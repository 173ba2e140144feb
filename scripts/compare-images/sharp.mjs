// The other side of make compare-images: sharp on one thread, and what is made
// with it for the comparison. It takes a JSON object a line on standard input
// and answers with one a line. compare_images_test.go drives it.
import { createInterface } from 'node:readline'
import { readFileSync, writeFileSync } from 'node:fs'
import sharp from 'sharp'

sharp.concurrency(1)
sharp.cache(false)

const operations = {
  async wait() { return {} },

  // compress does what the pipeline does: fit, upright, JPEG or, with alpha, PNG.
  async compress({ source, out, side, quality }) {
    const data = readFileSync(source)
    const before = process.cpuUsage()
    const image = sharp(data).autoOrient().resize(side, side, { fit: 'inside', withoutEnlargement: true })
    const { hasAlpha } = await sharp(data).metadata()
    const result = await (hasAlpha ? image.png() : image.jpeg({ quality })).toBuffer()
    const spent = process.cpuUsage(before)
    writeFileSync(out, result)
    return { cpu: spent.user + spent.system, bytes: result.length }
  },

  // reference resizes all of the pixels with sharp's own kernel, none skipped
  // while loading, and writes them as PNG.
  async reference({ source, out, side }) {
    await sharp(source).autoOrient()
      .resize(side, side, { fit: 'inside', withoutEnlargement: true, fastShrinkOnLoad: false })
      .png({ compressionLevel: 1 }).toFile(out)
    return {}
  },

  // resave makes a source of a given kind from a photo.
  async resave({ source, out, quality, chroma, progressive }) {
    const image = sharp(source).autoOrient()
    await (out.endsWith('.webp')
      ? image.webp({ quality })
      : image.jpeg({ quality, chromaSubsampling: chroma, progressive })).toFile(out)
    return {}
  },

  // shot cuts a thing with the photo's texture out of it, a bottle or a box, and
  // puts it on white with a soft shadow (JPEG), or on nothing (PNG).
  async shot({ source, out, side, shape }) {
    const object = shape === 'bottle'
      ? '<path d="M42 8h16v20c0 6 14 10 14 24v34c0 4-3 6-6 6H34c-3 0-6-2-6-6V52c0-14 14-18 14-24z"/>'
      : '<rect x="18" y="26" width="64" height="58" rx="5"/>'
    const svg = content => Buffer.from(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" width="${side}" height="${side}">${content}</svg>`)
    const cut = await sharp(source).resize(side, side, { fit: 'cover' })
      .composite([{ input: svg(object), blend: 'dest-in' }]).png({ compressionLevel: 1 }).toBuffer()
    const shadow = await sharp(svg(`<ellipse cx="50" cy="90" rx="36" ry="4" fill="black" fill-opacity="0.5"/>`))
      .blur(side / 60).png({ compressionLevel: 1 }).toBuffer()
    const background = out.endsWith('.png') ? { r: 0, g: 0, b: 0, alpha: 0 } : { r: 255, g: 255, b: 255, alpha: 1 }
    const whole = sharp({ create: { width: side, height: side, channels: 4, background } })
      .composite([{ input: shadow }, { input: cut }])
    await (out.endsWith('.png') ? whole.png() : whole.flatten().jpeg({ quality: 92 })).toFile(out)
    return {}
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const { operation, ...settings } = JSON.parse(line)
  let answer
  try {
    answer = await operations[operation](settings)
  } catch (err) {
    answer = { error: `${operation} ${settings.source}: ${err.message}` }
  }
  console.log(JSON.stringify(answer))
}
