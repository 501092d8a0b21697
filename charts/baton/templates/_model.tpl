{{/* Where processes find the model, and how it gets there. */}}

{{- define "baton.modelScheme" -}}
{{- regexFind "^[a-z0-9]+" .Values.model.uri }}
{{- end }}

{{/* The URI's last part, without the revision. */}}
{{- define "baton.modelName" -}}
{{- .Values.model.uri | trimSuffix "/" | splitList "/" | last | splitList "@" | first }}
{{- end }}

{{- define "baton.modelId" -}}
{{- .Values.model.id | default (include "baton.modelName" .) }}
{{- end }}

{{/* Whether the model has to be copied from somewhere: "true" or nothing. */}}
{{- define "baton.modelIsRemote" -}}
{{- if has (include "baton.modelScheme" .) (list "hf" "s3" "gs" "az") }}true{{ end }}
{{- end }}

{{- define "baton.modelFolder" -}}
{{- $scheme := include "baton.modelScheme" . }}
{{- $path := .Values.model.uri | trimPrefix (printf "%s://" $scheme) | trimSuffix "/" }}
{{- if eq $scheme "file" }}
{{- $path }}
{{- else if eq $scheme "pvc" }}
{{- printf "/models/%s" (splitList "/" $path | rest | join "/") | trimSuffix "/" }}
{{- else }}
{{- printf "/models/%s-%s" (include "baton.modelName" .) (sha256sum .Values.model.uri | trunc 8) }}
{{- end }}
{{- end }}

{{- define "baton.modelMount" -}}
{{- if ne (include "baton.modelScheme" .) "file" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- end }}

{{/* dict "root" $ "cache" "the claim that workers share, or nothing". */}}
{{- define "baton.modelVolume" -}}
{{- $scheme := include "baton.modelScheme" .root }}
{{- if eq $scheme "pvc" }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .root.Values.model.uri | trimPrefix "pvc://" | splitList "/" | first }}
    readOnly: true
{{- else if and .cache (ne $scheme "file") }}
- name: models
  persistentVolumeClaim:
    claimName: {{ .cache }}
{{- else if ne $scheme "file" }}
- name: models
  emptyDir: {}
{{- end }}
{{- end }}

{{- define "baton.modelCacheClaim" -}}
{{- if .Values.modelCache.enabled }}
{{- .Values.modelCache.existingClaim | default (printf "%s-models" (include "baton.fullname" .)) }}
{{- end }}
{{- end }}

{{/* The container that copies the model: dict "root" $ "image" NAME "arguments" (list "--config-only"). */}}
{{- define "baton.modelFetch" -}}
{{- if include "baton.modelIsRemote" .root }}
initContainers:
  - name: fetch-model
    image: {{ .image }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    args:
      - fetch
      - {{ .root.Values.model.uri }}
      - {{ include "baton.modelFolder" .root }}
      {{- range .arguments }}
      - {{ . }}
      {{- end }}
    {{- with .root.Values.model.existingSecret }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    {{- with .root.Values.model.extraEnv }}
    env:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    securityContext:
      {{- include "baton.containerSecurity" (dict "values" dict) | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
