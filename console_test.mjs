// A walk through the console in a real browser. TestConsoleInABrowser starts it,
// with running programs and a host of photos. make console has it leave pictures of what
// it saw in .cache/screenshots.

import assert from 'node:assert/strict'
import { mkdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { after, before, test } from 'node:test'

const { chromium } = createRequire(new URL('.cache/console/', import.meta.url))('playwright-core')
const { CONSOLE, GUARDED, DEGRADED, ADMIN_TOKEN, USER_TOKEN, PHOTOS, RELEASE } = process.env
const pictures = '.cache/screenshots'
const patience = 60_000 // milliseconds

// Two widths and two appearances. Both of each have to do, unless all four
// combinations are asked for (make console).
const allLooks = [
  { width: 1440, height: 900, colorScheme: 'light' }, { width: 390, height: 844, colorScheme: 'dark' },
  { width: 1440, height: 900, colorScheme: 'dark' }, { width: 390, height: 844, colorScheme: 'light' },
]
const everyLook = process.env.CONSOLE_LOOKS === 'all'
const looks = everyLook ? allLooks : allLooks.slice(0, 2)

let browser
before(async () => {
  if (everyLook) mkdirSync(pictures, { recursive: true })
  // The fewest processes that it can do with: each costs what loading a page does.
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox', '--in-process-gpu', '--renderer-process-limit=1'] })
})
after(() => browser?.close())

/** The context of a look, with a page that keeps its process: starting one costs more than most tests here. */
const contexts = new Map()
async function contextOf(look) {
  if (!contexts.has(look)) {
    const { width, height, colorScheme } = look
    const context = await browser.newContext({ viewport: { width, height }, colorScheme, reducedMotion: 'reduce', locale: 'en-GB', hasTouch: width < 500, serviceWorkers: 'block' })
    context.setDefaultTimeout(patience)
    await (await context.newPage()).goto(CONSOLE + '/healthz')
    contexts.set(look, context)
  }
  return contexts.get(look)
}

/**
 * Opens a page that must have no error and ask nobody but the program. answers
 * are the statuses besides success that the browser may see, foreign the only
 * other origin that it may ask.
 */
async function visit(t, path, { base = CONSOLE, look = looks[0], answers = [], foreign = null } = {}) {
  const page = await (await contextOf(look)).newPage()
  const errors = []
  const asked = new Set()
  page.on('console', (message) => {
    const status = /status of (\d+)/.exec(message.text())?.[1]
    if (['error', 'warning'].includes(message.type()) && !answers.includes(Number(status))) errors.push(message.text())
  })
  page.on('pageerror', (error) => errors.push(String(error)))
  page.on('request', (request) => {
    asked.add(new URL(request.url()).origin)
    if (request.url().includes(ADMIN_TOKEN) || request.url().includes(USER_TOKEN)) errors.push(`a token in ${request.url()}`)
  })
  t.after(async () => {
    await page.close()
    assert.deepEqual(errors, [], 'errors in the browser')
    assert.deepEqual([...asked].filter((origin) => origin !== base && origin !== foreign), [], 'origins that were asked')
  })
  await page.goto(base + '/#' + path)
  return page
}

const named = (page, role, name) => page.getByRole(role, { name, exact: true })

/** Takes a picture of a page, in a walk of every look. The first has the browser paint images that were decoded beside it. */
async function picture(page, look, name) {
  if (!everyLook) return
  await page.screenshot()
  await page.screenshot({ path: `${pictures}/${look.width}-${look.colorScheme}-${name}.png` })
}

/** Calls the API past the console, as another client does. */
async function api(method, path, body, base = CONSOLE, token = null) {
  const headers = { 'Content-Type': 'application/json' }
  if (token) headers.Authorization = `Bearer ${token}`
  const response = await fetch(base + path, { method, headers, body: body && JSON.stringify(body) })
  assert.ok(response.ok, `${method} ${path}: ${response.status}`)
  return response.status === 204 ? null : response.json()
}

function create(name, price, images, more = {}) {
  return api('POST', '/products', { user_id: 1, product_name: name, product_price: price, product_images: images.map((image) => `${PHOTOS}/${image}`), ...more })
}

/** Waits until something is as wanted, without a fixed pause. */
async function until(what, holds) {
  const deadline = Date.now() + patience
  for (;;) {
    const value = await holds()
    if (value) return value
    if (Date.now() > deadline) assert.fail(`never came true: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

const settled = (id) => until(`product ${id} is settled`, async () => {
  const product = await api('GET', `/products/${id}`)
  return product.images.every((image) => image.status !== 'pending') && product
})

/** Every control that a screen reader comes across must have a name. */
async function assertNamed(page) {
  const session = await page.context().newCDPSession(page)
  const { nodes } = await session.send('Accessibility.getFullAXTree')
  await session.detach()
  const roles = ['button', 'link', 'textbox', 'searchbox', 'combobox', 'checkbox', 'slider', 'spinbutton', 'image', 'img', 'dialog', 'region', 'navigation', 'search', 'listbox', 'option']
  const nameless = nodes.filter((node) => !node.ignored && roles.includes(node.role?.value) && !node.name?.value?.trim())
  assert.deepEqual(nameless.map((node) => `${node.role.value} ${node.backendDOMNodeId}`), [], 'controls without a name')
}

/** No part of the page may stick out at its side. */
async function assertFits(page) {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth])
  assert.ok(content <= window, `the page is ${content} px wide in a window of ${window} px`)
}

/** Text must stand out from what is behind it (WCAG 2.2, 1.4.3). */
async function assertContrast(page) {
  const faint = await page.evaluate(() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })
    const rgba = (color) => {
      canvas.clearRect(0, 0, 1, 1)
      canvas.fillStyle = color
      canvas.fillRect(0, 0, 1, 1)
      return [...canvas.getImageData(0, 0, 1, 1).data]
    }
    const luminance = (color) => {
      const [r, g, b] = color.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
      return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }
    const behind = (element) => {
      for (let e = element; e; e = e.parentElement) {
        const style = getComputedStyle(e)
        if (style.backgroundImage !== 'none') return null // a picture or a shimmer: not a matter of one colour
        const color = rgba(style.backgroundColor)
        if (color[3] === 255) return color
        if (color[3] > 0) return null
      }
      return [255, 255, 255, 255]
    }
    const found = []
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (texts.nextNode()) {
      const element = texts.currentNode.parentElement
      if (!texts.currentNode.data.trim() || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || element.closest(':disabled')) continue
      const background = behind(element)
      if (!background) continue
      const [light, dark] = [luminance(rgba(getComputedStyle(element).color).slice(0, 3)), luminance(background.slice(0, 3))].sort((a, b) => b - a)
      const ratio = (light + 0.05) / (dark + 0.05)
      if (ratio < 4.5) found.push(`${texts.currentNode.data.trim()}: ${ratio.toFixed(2)}`)
    }
    return found
  })
  assert.deepEqual(faint, [], 'text that hardly stands out')
}

async function assertGood(page) {
  await assertNamed(page)
  await assertFits(page)
  await assertContrast(page)
}

const products = {}

test('an empty shop says so, and is painted at once', async (t) => {
  const page = await visit(t, '/products')
  await page.getByText('No products yet').waitFor()
  await assertGood(page)
  await picture(page, looks[0], 'empty')
  const paint = await until('a first paint within 500 ms', async () => { // of some load: the machine has other things to do
    await page.reload()
    await page.getByText('No products yet').waitFor()
    // The text may be there before it is painted: then there is no entry yet.
    const startTime = await page.evaluate(() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime)
    return startTime < 500 && startTime
  })
  t.diagnostic(`first contentful paint after ${Math.round(paint)} ms`)
})

test('a product is created, and its images become ready while one looks on', async (t) => {
  const page = await visit(t, '/products')
  await named(page, 'button', 'New product').click()
  await page.getByLabel('Name', { exact: true }).fill('Mountain print')
  await page.getByRole('dialog').getByLabel('Price', { exact: true }).fill('89,90')
  await page.getByLabel('Description').fill('Three sizes, matt paper.')
  await page.getByLabel('Image 1', { exact: true }).fill(`${PHOTOS}/mountains.jpg`)
  await named(page, 'button', 'Add an image').click()
  await page.getByLabel('Image 2', { exact: true }).fill(`${PHOTOS}/slow.jpg`)
  await named(page, 'button', 'Create').click()
  await named(page, 'heading', 'Mountain print').waitFor()
  await page.getByRole('button', { name: /^Show image 1/ }).locator('.pill', { hasText: 'Ready' }).waitFor()
  await page.getByRole('button', { name: /^Show image 2/ }).locator('.pill', { hasText: /In work|Waits for try/ }).waitFor()
  await assertGood(page)
  await picture(page, looks[0], 'live')
  await fetch(`${RELEASE}/slow.jpg`)
  await page.getByRole('button', { name: /^Show image 2/ }).locator('.pill', { hasText: 'Ready' }).waitFor()
  await page.getByText('2 of 2 ready').waitFor()
  await page.getByText('640 × 480').waitFor()
  await page.getByText('89.90').waitFor()
  products.mountain = Number(/products\/(\d+)/.exec(page.url())[1])
})

test('what the API refuses is shown at its field', async (t) => {
  const page = await visit(t, '/products', { answers: [422] })
  await named(page, 'button', 'New product').click()
  await page.getByRole('dialog').getByLabel('Price', { exact: true }).fill('12.345')
  await page.getByRole('dialog').getByLabel('User ID', { exact: true }).fill('1')
  await page.getByLabel('Image 1', { exact: true }).fill('ftp://example.com/a.jpg')
  await named(page, 'button', 'Create').click()
  for (const label of ['Name', 'Price', 'Image 1']) {
    const control = page.getByRole('dialog').getByLabel(label, { exact: true })
    await until(`${label} is marked`, async () => await control.getAttribute('aria-invalid') === 'true')
    const ids = (await control.getAttribute('aria-describedby')).split(' ')
    const texts = await Promise.all(ids.map((id) => page.locator(`#${id}`).textContent()))
    assert.ok(texts.join(' ').includes('ust '), `${label} says ${texts}`)
  }
  assert.equal(await page.evaluate(() => document.activeElement.name), 'product_name')
  await assertGood(page)
  await picture(page, looks[0], 'refused')
  await page.keyboard.press('Escape')
  await named(page, 'button', 'Leave').click()
  await page.getByRole('dialog').waitFor({ state: 'detached' })
})

test('an edit that was overtaken tells what it would have undone', async (t) => {
  const page = await visit(t, `/products/${products.mountain}`, { answers: [412] })
  await named(page, 'button', 'Edit').click()
  await page.getByLabel('Name', { exact: true }).fill('Mountain print, large')
  await api('PATCH', `/products/${products.mountain}`, { product_price: '99.00' })
  await named(page, 'button', 'Save').click()
  await page.getByText('Somebody else has changed this product meanwhile.').waitFor()
  await page.getByRole('alert').getByText('89.90 → 99.00').waitFor()
  assert.equal((await api('GET', `/products/${products.mountain}`)).product_name, 'Mountain print')
  await assertGood(page)
  await picture(page, looks[0], 'conflict')
  await named(page, 'button', 'Keep my changes').click()
  await named(page, 'button', 'Save').click()
  await named(page, 'heading', 'Mountain print, large').waitFor()
  const now = await api('GET', `/products/${products.mountain}`)
  assert.deepEqual([now.product_name, now.product_price], ['Mountain print, large', 99], 'both changes are there')

  await named(page, 'button', 'Edit').click()
  await page.getByRole('dialog').getByLabel('Price', { exact: true }).fill('1')
  await api('PATCH', `/products/${products.mountain}`, { product_name: 'Mountain print' })
  await named(page, 'button', 'Save').click()
  await named(page, 'button', 'Take theirs').click()
  assert.equal(await page.getByLabel('Name', { exact: true }).inputValue(), 'Mountain print')
  await page.getByRole('dialog').getByLabel('Price', { exact: true }).fill('89.90')
  await named(page, 'button', 'Save').click()
  await page.getByRole('dialog').waitFor({ state: 'detached' })
  assert.equal((await api('GET', `/products/${products.mountain}`)).product_price, 89.9)
})

test('what the form itself makes of a text is no edit', async (t) => {
  const { id } = await create('Wave print ', '20.00', [], { product_description: 'One\r\ntwo' })
  const page = await visit(t, `/products/${id}`, { answers: [412] })
  const change = async (price, meanwhile) => {
    await named(page, 'button', 'Edit').click()
    await page.getByRole('dialog').getByLabel('Price', { exact: true }).fill(price)
    await meanwhile?.()
    await named(page, 'button', 'Save').click()
  }
  const saved = async (...wanted) => {
    await page.getByRole('dialog').waitFor({ state: 'detached' })
    const now = await api('GET', `/products/${id}`)
    assert.deepEqual([now.product_price, now.product_name, now.product_description], wanted)
  }
  await change('21.00')
  await saved(21, 'Wave print ', 'One\r\ntwo')
  await change('22.00', () => api('PATCH', `/products/${id}`, { product_description: 'Three\r\nfour' }))
  await named(page, 'button', 'Keep my changes').click()
  await named(page, 'button', 'Save').click()
  await saved(22, 'Wave print ', 'Three\r\nfour')
  await page.goto('about:blank')
  await api('DELETE', `/products/${id}`)
})

test('an edit is not stopped by an image that became ready meanwhile', async (t) => {
  const { id } = await create('Stream print', '35.00', ['stream.jpg'])
  const page = await visit(t, `/products/${id}`, { answers: [412] })
  await named(page, 'button', 'Edit').click()
  await page.getByLabel('Name', { exact: true }).fill('Stream print, framed')
  await settled(id)
  await named(page, 'button', 'Save').click()
  await named(page, 'heading', 'Stream print, framed').waitFor()
  assert.equal((await api('GET', `/products/${id}`)).product_name, 'Stream print, framed')
})

test('before and after are compared by dragging, and only on demand', async (t) => {
  const { id } = await create('Fig bowl', '45.00', ['bowl.jpg', 'stream.jpg', 'gone.jpg'], { product_description: 'Hand-thrown stoneware, glazed in three coats. The fig is not included.' })
  await settled(id)
  for (const look of looks) {
    const page = await visit(t, `/products/${id}`, { look, foreign: PHOTOS })
    await page.getByRole('img', { name: 'Fig bowl, image 1' }).waitFor()
    await page.evaluate(() => Promise.all([...document.images].map((image) => image.decode())))
    await assertGood(page)
    await picture(page, look, 'product')
    const sources = page.locator(`img[src^="${PHOTOS}"]`)
    assert.equal(await sources.count(), 0)
    await named(page, 'button', 'Compare with the original').click()
    await until('the original is there', () => sources.first().evaluate((image) => image.complete && image.naturalWidth > 0).catch(() => false))
    const slider = page.getByRole('slider')
    const box = await slider.boundingBox()
    await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2)
    await page.mouse.down()
    await page.mouse.move(box.x + box.width / 4, box.y + box.height / 2)
    await page.mouse.up()
    const dragged = Number(await slider.inputValue())
    assert.ok(dragged > 20 && dragged < 30, `dragged to ${dragged}`)
    await slider.press('ArrowRight')
    assert.equal(Number(await slider.inputValue()), dragged + 1)
    await slider.press('End')
    await slider.press('Home')
    await slider.fill('40')
    await assertGood(page)
    await picture(page, look, 'compare')
  }
})

test('products are filtered and sorted', async (t) => {
  await Promise.all([
    create('Garden print', '30.00', ['stream.jpg']), create('Dog print', '60.00', ['dogs.jpg']),
    create('Bird lamp', '1250.00', ['lamp.jpg']), create('Gift card', '20.00', []), create('Lost print', '12.00', ['gone.jpg']),
    create('Brush set', '25.50', ['brushes.jpg', 'bowl.jpg']), create('Wall clock', '49.00', ['clock.jpg', 'shaky.jpg']),
  ])
  await until('all images are settled', async () => (await api('GET', '/products?limit=200')).items.every((p) => p.images.every((i) => i.status !== 'pending')))
  const page = await visit(t, '/products', { answers: [422] })
  const names = () => page.locator('.card-name').allTextContents()
  await until('all are there', async () => (await names()).length === 10)
  await page.getByRole('searchbox', { name: 'Search by name' }).fill('PRINT')
  await page.getByLabel('Min. price').fill('30')
  await page.getByLabel('Max. price').fill('60')
  await page.getByLabel('Sort').selectOption('Price, low to high')
  const wanted = ['Garden print', 'Stream print, framed', 'Dog print']
  await until('the filter holds', async () => JSON.stringify(await names()) === JSON.stringify(wanted))
  await page.getByLabel('Sort').selectOption('Name, Z to A')
  await until('the order turns', async () => (await names())[0] === 'Stream print, framed' && (await names())[2] === 'Dog print')
  assert.match(page.url(), /name=PRINT/)
  await page.reload()
  await until('the filter outlives a reload', async () => (await names()).length === 3)
  await page.getByLabel('User ID').fill('7')
  await page.getByText('No product matches').waitFor()
  await page.getByLabel('User ID').fill('x')
  await page.getByText('This filter cannot be used').waitFor()
  await named(page, 'button', 'Clear').click()
  await until('all are there again', async () => (await names()).length === 10)
})

test('a long list comes in pages', async (t) => {
  const rest = Array.from({ length: 50 }, (_, n) => create(`Page ${n}`, '1.00', []))
  const ids = (await Promise.all(rest)).map(({ id }) => id)
  const page = await visit(t, '/products?name=Page')
  await page.getByText('48 products, and there are more').waitFor()
  await named(page, 'button', 'Show more').click()
  await page.getByText('50 products', { exact: true }).waitFor()
  assert.equal(await page.locator('.card').count(), 50)
  assert.ok(ids.map((id) => `#/products/${id}`).includes(await page.evaluate(() => document.activeElement.getAttribute('href'))))
  await Promise.all(ids.map((id) => api('DELETE', `/products/${id}`)))
})

test('the products are fit to be seen', async (t) => {
  for (const look of looks) {
    const page = await visit(t, '/products', { look })
    await page.locator('.card').first().waitFor()
    await page.evaluate(() => Promise.all([...document.images].filter((image) => image.getBoundingClientRect().top < innerHeight).map((image) => image.decode())))
    await assertGood(page)
    await picture(page, look, 'products')
    if (look.width < 500) {
      await named(page, 'button', 'Filters').click()
      await assertGood(page)
      await picture(page, look, 'filters')
    }
    await named(page, 'button', 'New product').click()
    await assertGood(page)
    await picture(page, look, 'create')
  }
})

test('dead letters are filtered, looked into, replayed and discarded', async (t) => {
  const [back, again, notes] = await Promise.all([create('Back print', '5.00', ['back.jpg']), create('Again print', '6.00', ['again.jpg']), create('Notes', '7.00', ['notes.txt', 'notes.txt'])])
  await Promise.all([back, again, notes].map(({ id }) => settled(id)))
  for (const look of looks) {
    const page = await visit(t, '/dead-letters', { look })
    await page.locator('.letter').first().waitFor()
    await page.getByRole('button', { name: /^History of/ }).first().click()
    await page.locator('.attempts li').first().waitFor()
    await page.getByRole('checkbox', { name: /^Select dead/ }).nth(1).check()
    await assertGood(page)
    await picture(page, look, 'dead-letters')
  }

  const page = await visit(t, '/dead-letters', { answers: [404] })
  await page.locator('.summary').getByText('6 dead letters').waitFor()
  await page.getByRole('button', { name: 'Show only not_an_image' }).first().click()
  await page.locator('.summary').getByText('2 dead letters').waitFor()
  await page.getByLabel('Host').fill('nowhere.example')
  await page.getByText('No dead letter matches').waitFor()
  await page.getByLabel('Host').fill(new URL(PHOTOS).host)
  await page.getByLabel('Failed since').selectOption('Last hour')
  await page.locator('.summary').getByText('2 dead letters').waitFor()
  await page.getByLabel('Select all shown').check()
  await page.getByRole('region', { name: 'Selected dead letters' }).getByRole('button', { name: 'Discard' }).click()
  await page.getByRole('dialog').waitFor()
  await picture(page, looks[0], 'confirm')
  await page.getByRole('dialog').getByRole('button', { name: 'Discard', exact: true }).click()
  await page.getByText('No dead letter matches').waitFor()
  assert.equal((await api('GET', '/dead-letters?code=not_an_image')).items.length, 0)

  await page.getByLabel('Error code').fill('')
  await page.locator('.summary').getByText('4 dead letters').waitFor()
  await page.getByRole('button', { name: /^Replay dead letter \d+, back.jpg/ }).click()
  await page.locator('.summary').getByText('3 dead letters').waitFor()
  assert.equal((await settled(back.id)).images[0].status, 'ready')

  await page.getByRole('button', { name: /^Discard dead letter/ }).first().click()
  await page.getByRole('dialog').getByRole('button', { name: 'Discard', exact: true }).click()
  await page.locator('.summary').getByText('2 dead letters').waitFor()
  await named(page, 'button', 'Replay all that match').click()
  await page.getByRole('dialog').getByRole('button', { name: 'Replay all' }).click()
  await page.getByText('2 dead letters replayed.').waitFor()
  assert.equal((await settled(again.id)).images[0].status, 'ready')
})

test('a failed image is replayed from its product', async (t) => {
  const { id } = await create('Late print', '8.00', ['late.jpg'])
  await settled(id)
  const page = await visit(t, `/products/${id}`)
  await page.getByText('http_404').waitFor()
  await named(page, 'button', 'Replay').click()
  await page.getByText('The image is queued anew.').waitFor()
  await page.getByText('1 of 1 ready').waitFor()
  await named(page, 'button', 'Delete').click()
  await page.getByRole('dialog').getByRole('button', { name: 'Delete' }).click()
  await page.getByText('The product is deleted.').waitFor()
  assert.equal((await fetch(`${CONSOLE}/products/${id}`)).status, 404)
})

test('a dead letter is found whatever its host looks like in a browser', async (t) => {
  const { id } = await api('POST', '/products', { user_id: 1, product_name: 'Odd host', product_price: '8.00', product_images: ['http://127.1/odd.jpg'] })
  await settled(id)
  const page = await visit(t, `/products/${id}`)
  await named(page, 'button', 'Replay').click()
  await page.getByText('The image is queued anew.').waitFor()
  await settled(id)
  await page.getByRole('link', { name: 'Dead letters of this host' }).click()
  await page.getByText(`product ${id}, image 1`).waitFor()
  await api('DELETE', `/products/${id}`)
})

test('the keyboard alone is enough', async (t) => {
  const page = await visit(t, '/products')
  await page.locator('.card').first().waitFor()
  const tabTo = async (role, name, within = page) => {
    const target = named(within, role, name).first()
    for (let n = 0; n < 60; n++) {
      if (await target.evaluate((element) => element === document.activeElement)) return
      await page.keyboard.press('Tab')
    }
    assert.fail(`Tab does not lead to ${role} ${name}`)
  }
  const focused = () => page.evaluate(() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText.trim())
  await page.keyboard.press('Tab')
  assert.equal(await focused(), 'Skip to the content')
  await page.keyboard.press('Enter')
  assert.equal(await page.evaluate(() => document.activeElement.id), 'main')
  await tabTo('button', 'New product')
  const ring = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle)
  assert.equal(ring, 'solid', 'the focus can be seen')
  await page.keyboard.press('Enter')
  await page.keyboard.type('Keyboard print')
  await page.keyboard.press('Tab')
  await page.keyboard.type('10')
  await tabTo('textbox', 'Image 1')
  await page.keyboard.type(`${PHOTOS}/lamp.jpg`)
  await page.keyboard.press('Enter')
  await named(page, 'heading', 'Keyboard print').waitFor()
  await page.getByText('1 of 1 ready').waitFor()
  await tabTo('button', 'Edit')
  await page.keyboard.press('Enter')
  await page.getByRole('dialog').waitFor()
  await page.keyboard.press('Escape')
  await page.getByRole('dialog').waitFor({ state: 'detached' })
  assert.equal(await focused(), 'Edit', 'the focus is back where it was')
  await tabTo('button', 'Delete')
  await page.keyboard.press('Enter')
  await page.getByRole('dialog').waitFor()
  assert.equal(await focused(), 'Cancel', 'what cannot be taken back is not the first choice')
  await tabTo('button', 'Delete', page.getByRole('dialog'))
  await page.keyboard.press('Enter')
  await page.getByText('The product is deleted.').waitFor()
})

test('the overview plots what happened', async (t) => {
  await until('there are samples of the work', async () => {
    const { samples } = await api('GET', '/overview')
    return samples.reduce((sum, { images }) => sum + (images?.ready ?? 0), 0) >= 10
  })
  for (const look of looks) {
    const page = await visit(t, '/overview', { look })
    await page.getByText('All parts work.').waitFor()
    assert.equal(await page.locator('svg.plot').count(), 6)
    for (const label of await page.locator('svg.plot').evaluateAll((plots) => plots.map((plot) => plot.getAttribute('aria-label')))) {
      assert.match(label, /^[A-Z].*: .*Highest in the time shown: /)
    }
    await assertGood(page)
    await picture(page, look, 'overview')
  }
})

test('the overview says which part is away, and what that means', async (t) => {
  for (const look of looks.slice(0, 2)) {
    const page = await visit(t, '/overview', { base: DEGRADED, look })
    await page.getByText('Degraded: a part is away').waitFor()
    await page.getByText('Reads go to the database and take longer.').waitFor()
    await named(page, 'link', 'Service: Degraded').waitFor()
    await assertGood(page)
    await picture(page, look, 'degraded')
  }
})

test('with authentication on a token is asked for, and kept for the session alone', async (t) => {
  const page = await visit(t, '/products', { base: GUARDED, answers: [401] })
  await named(page, 'heading', 'Token needed').waitFor()
  await page.keyboard.press('Escape')
  await assertGood(page)
  await picture(page, looks[0], 'token')
  await page.getByLabel('API token').fill('wrong')
  await named(page, 'button', 'Continue').click()
  await page.getByText('That token is not valid.').waitFor()
  await page.getByLabel('API token').fill(ADMIN_TOKEN)
  await page.keyboard.press('Enter')
  await page.getByText('No products yet').waitFor()
  assert.deepEqual(await page.evaluate(() => [Object.values(sessionStorage), Object.values(localStorage), document.cookie]), [[ADMIN_TOKEN], [], ''])
  const { id } = await api('POST', '/products', { user_id: 1, product_name: 'Guarded print', product_price: 1, product_images: [`${PHOTOS}/guarded.jpg`] }, GUARDED, ADMIN_TOKEN)
  const stream = page.waitForResponse((response) => response.url().endsWith(`/products/${id}/events`))
  await page.goto(`${GUARDED}/#/products/${id}`)
  assert.equal((await stream).status(), 200, 'the stream has the token too')
  await fetch(`${RELEASE}/guarded.jpg`)
  await page.getByText('1 of 1 ready').waitFor()
  await named(page, 'link', 'Overview').click()
  await page.getByText('All parts work.').waitFor()
  await named(page, 'button', 'Forget the token').click()
  await named(page, 'heading', 'Token needed').waitFor()
  assert.equal(await page.evaluate(() => sessionStorage.length), 0)
})

test('a user’s token is told what needs an admin’s', async (t) => {
  const page = await visit(t, '/dead-letters', { base: GUARDED, answers: [401, 403] })
  await page.getByLabel('API token').fill(USER_TOKEN)
  await named(page, 'button', 'Continue').click()
  await page.getByText('This needs an admin’s token').waitFor()
  await assertGood(page)
  await named(page, 'link', 'Products').click()
  await page.getByText('Guarded print').waitFor()
})

test('what cannot be loaded says so and can be tried again', async (t) => {
  const page = await visit(t, '/products', { answers: [503, 404] })
  await page.locator('.card').first().waitFor()
  await page.route('**/products?*', (route) => route.fulfill({ status: 503, contentType: 'application/problem+json', body: '{"detail":"the service cannot do this right now, try again","request_id":"r1"}' }))
  await page.getByLabel('Sort').selectOption('Oldest first')
  await page.getByText('This could not be loaded').waitFor()
  await page.getByText('request r1').waitFor()
  await assertGood(page)
  await picture(page, looks[0], 'failure')
  await page.unroute('**/products?*')
  await named(page, 'button', 'Try again').click()
  await page.locator('.card').first().waitFor()
  await page.goto(`${CONSOLE}/#/products/987654`)
  await page.getByText('There is no product 987654').waitFor()
})

test('the reader chooses between light and dark', async (t) => {
  const page = await visit(t, '/products')
  const background = () => page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor)
  const light = await background()
  await named(page, 'button', 'Dark appearance').click()
  const dark = await background()
  assert.notEqual(dark, light)
  await page.reload()
  assert.equal(await background(), dark)
  await page.evaluate(() => localStorage.clear()) // the next page of this look begins in its own
})
