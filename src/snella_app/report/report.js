// Add a copy button to every code block.
for (const pre of document.querySelectorAll('pre.copy')) {
  const button = document.createElement('button')
  button.type = 'button'
  button.className = 'copy'
  button.textContent = 'Copy'
  button.setAttribute('aria-label', 'Copy this code')
  button.addEventListener('click', async () => {
    const text = pre.textContent
    try {
      await navigator.clipboard.writeText(text)
    } catch {
      // the Clipboard API needs a secure context (https or file); otherwise select the code and copy it
      const range = document.createRange()
      range.selectNodeContents(pre)
      getSelection().removeAllRanges()
      getSelection().addRange(range)
      document.execCommand('copy')
    }
    button.textContent = 'Copied'
    setTimeout(() => { button.textContent = 'Copy' }, 2000)
  })
  const frame = document.createElement('div')
  frame.className = 'code'
  pre.replaceWith(frame)
  frame.append(pre, button)
}
