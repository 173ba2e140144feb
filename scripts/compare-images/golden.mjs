// Makes testdata/golden: small images of each kind (NAME.EXT), how an independent
// decoder sees them upright and in sRGB (NAME.whole.png), and the same at half
// the size (NAME.half.png). JPEGs whose profile the pipeline keeps are seen by
// djpeg, which knows no profiles. After make compare-images has installed sharp:
//
//   node .cache/compare-images/golden.mjs .cache/photos/Dragonfly_by_Bolly.jpg testdata/golden
import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync, statSync, readdirSync } from 'node:fs'
import sharp from 'sharp'

const [photo, dir] = process.argv.slice(2)
const [width, height] = [40, 28]
mkdirSync(dir, { recursive: true })

const base = await sharp(photo).resize(width, height, { fit: 'cover' }).blur(1.2).toColourspace('srgb').png().toBuffer()
const jpeg = { quality: 92, chromaSubsampling: '4:2:0' }
const disc = Buffer.from(`<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"><ellipse cx="18" cy="14" rx="15" ry="11"/></svg>`)
const cut = await sharp(base).ensureAlpha().composite([{ input: disc, blend: 'dest-in' }]).png().toBuffer()

async function golden(name, image, view = data => sharp(data).autoOrient().toColourspace('srgb').png().toBuffer()) {
  const data = await image.toBuffer()
  writeFileSync(`${dir}/${name}`, data)
  const whole = await view(data)
  const { width: w, height: h } = await sharp(whole).metadata()
  writeFileSync(`${dir}/${name}.whole.png`, whole)
  writeFileSync(`${dir}/${name}.half.png`, await sharp(whole).resize(w / 2, h / 2, { kernel: 'cubic' }).png().toBuffer())
}

// seenByDjpeg reads what djpeg writes: "P6", width, height, 255, and the pixels.
function seenByDjpeg(data) {
  const pnm = execFileSync('djpeg', ['-pnm'], { input: data })
  const pixels = pnm.subarray(pnm.length - 3 * width * height)
  return sharp(pixels, { raw: { width, height, channels: 3 } }).png().toBuffer()
}

for (let orientation = 1; orientation <= 8; orientation++) {
  await golden(`orientation-${orientation}.jpg`, sharp(base).withMetadata({ orientation }).jpeg(jpeg))
}
await golden('progressive-444.jpg', sharp(base).jpeg({ quality: 92, chromaSubsampling: '4:4:4', progressive: true }))
await golden('grey.jpg', sharp(base).toColourspace('b-w').jpeg(jpeg))
await golden('display-p3.jpg', sharp(base).withIccProfile('p3').jpeg(jpeg), seenByDjpeg)
await golden('cmyk.jpg', sharp(base).toColourspace('cmyk').jpeg(jpeg), seenByDjpeg)
// The same samples, said to be YCCK: no encoder at hand writes it.
const ycck = await sharp(base).toColourspace('cmyk').jpeg(jpeg).toBuffer()
ycck[ycck.indexOf('Adobe') + 11] = 2
await golden('ycck.jpg', { toBuffer: async () => ycck }, seenByDjpeg)
await golden('interlaced-16-bit.png', sharp(base).toColourspace('rgb16').png({ progressive: true }))
await golden('grey-16-bit.png', sharp(base).toColourspace('grey16').png())
await golden('alpha.png', sharp(cut).png())
await golden('alpha-16-bit.png', sharp(cut).toColourspace('rgb16').png({ progressive: true }))
await golden('palette.png', sharp(cut).png({ palette: true, colours: 32 }))
await golden('lossy.webp', sharp(base).webp({ quality: 92 }))
await golden('lossy-alpha.webp', sharp(cut).webp({ quality: 92 }))
await golden('lossless-alpha.webp', sharp(cut).webp({ lossless: true }))
await golden('palette.gif', sharp(cut).gif({ colours: 32 }))

const total = readdirSync(dir).reduce((sum, name) => sum + statSync(`${dir}/${name}`).size, 0)
console.log(`${total} bytes in ${dir}`)
